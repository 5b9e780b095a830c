//! In front of calls that carry one message each way.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tonic::server::NamedService;

use super::{auth, opening};
use crate::identity::Identity;

/// A service whose callers are known before it reads what they send, and whose requests have to arrive in time.
///
/// What a caller may do is for the service to say. The generated services read the whole message before their handlers are asked,
/// so without this anyone could make them hold one.
#[derive(Clone)]
pub(crate) struct Guarded<S> {
    inner: S,
    identity: Identity,
    /// Calls that anyone may make.
    open: &'static [&'static str],
}

impl<S> Guarded<S> {
    pub(crate) fn new(inner: S, identity: Identity, open: &'static [&'static str]) -> Self {
        Self { inner, identity, open }
    }
}

impl<S: NamedService> NamedService for Guarded<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> tower::Service<http::Request<Body>> for Guarded<S>
where
    S: tower::Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S: Clone + Send + 'static,
    S::Future: Send,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // A generated service is always ready.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let Self { mut inner, identity, open } = self.clone();
        Box::pin(async move {
            let (head, mut body) = request.into_parts();
            if !open.contains(&head.uri.path()) {
                let metadata = MetadataMap::from_headers(head.headers.clone());
                if let Err(status) = auth::verify(&identity, &metadata).await {
                    opening::linger(&mut body).await;
                    return Ok(status.into_http());
                }
            }
            inner.call(http::Request::from_parts(head, opening::timely(body))).await
        })
    }
}
