//! The calls that carry no events, behind the generated service.

use std::pin::Pin;
use std::sync::Arc;

use ensign_proto::Permission;
use ensign_proto::pb::ensign::v1beta1 as api;
use ensign_proto::pb::ensign::v1beta1::ensign_server::Ensign;
use futures::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::auth::{self, Need};
use super::{Shared, info, topics};
use crate::health::Phase;
use crate::status::text;

/// The handlers.
#[derive(Clone)]
pub(super) struct Unary(pub(super) Arc<Shared>);

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The streams are served by hand, one level up, and never get here.
fn elsewhere<T>() -> Result<T, Status> {
    Err(Status::internal("this call is served elsewhere"))
}

#[tonic::async_trait]
impl Ensign for Unary {
    type PublishStream = Replies<api::PublisherReply>;
    type SubscribeStream = Replies<api::SubscribeReply>;
    type EnSQLStream = Replies<api::EventWrapper>;

    async fn publish(
        &self,
        _: Request<Streaming<api::PublisherRequest>>,
    ) -> Result<Response<Self::PublishStream>, Status> {
        elsewhere()
    }

    async fn subscribe(
        &self,
        _: Request<Streaming<api::SubscribeRequest>>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        elsewhere()
    }

    async fn en_sql(&self, _: Request<api::Query>) -> Result<Response<Self::EnSQLStream>, Status> {
        elsewhere()
    }

    async fn explain(&self, request: Request<api::Query>) -> Result<Response<api::QueryExplanation>, Status> {
        let caller = auth::authorize(&self.0, request.metadata(), Need::All(&[Permission::Subscriber])).await?;
        caller.project()?;
        Err(Status::unimplemented("explain query is not implemented yet"))
    }

    async fn list_topics(&self, request: Request<api::PageInfo>) -> Result<Response<api::TopicsPage>, Status> {
        topics::list(&self.0, request).await
    }

    async fn create_topic(&self, request: Request<api::Topic>) -> Result<Response<api::Topic>, Status> {
        topics::create(&self.0, request).await
    }

    async fn retrieve_topic(&self, request: Request<api::Topic>) -> Result<Response<api::Topic>, Status> {
        topics::retrieve(&self.0, request).await
    }

    async fn delete_topic(&self, request: Request<api::TopicMod>) -> Result<Response<api::TopicStatus>, Status> {
        topics::delete(&self.0, request).await
    }

    async fn topic_names(&self, request: Request<api::PageInfo>) -> Result<Response<api::TopicNamesPage>, Status> {
        topics::names(&self.0, request).await
    }

    async fn topic_exists(&self, request: Request<api::TopicName>) -> Result<Response<api::TopicExistsInfo>, Status> {
        topics::exists(&self.0, request).await
    }

    async fn set_topic_policy(&self, request: Request<api::TopicPolicy>) -> Result<Response<api::TopicStatus>, Status> {
        topics::set_policy(&self.0, request).await
    }

    async fn info(&self, request: Request<api::InfoRequest>) -> Result<Response<api::ProjectInfo>, Status> {
        info::project(&self.0, request).await
    }

    async fn status(&self, _: Request<api::HealthCheck>) -> Result<Response<api::ServiceState>, Status> {
        let now = self.0.parts.clock.wall().0;
        let up = now.saturating_sub(self.0.started.0);
        let phase = *self.0.parts.phase.borrow();
        let status = match phase {
            Phase::Serving => api::service_state::Status::Healthy,
            Phase::Starting => api::service_state::Status::Unhealthy,
            Phase::Stopping => api::service_state::Status::Offline,
        };
        let minutes = |minutes: u64| Some(ensign_proto::convert::timestamp(now + minutes * 60 * 1_000_000_000));
        let uptime = ensign_proto::convert::timestamp(up);
        Ok(Response::new(api::ServiceState {
            status: status.into(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime: Some(prost_types::Duration { seconds: uptime.seconds, nanos: uptime.nanos }),
            not_before: minutes(1),
            not_after: minutes(60),
        }))
    }
}

/// The refusal of a topic that is not there, or not the caller's.
pub(super) fn not_found() -> Status {
    Status::not_found(text::TOPIC_NOT_FOUND)
}
