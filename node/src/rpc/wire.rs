//! gRPC by hand, for the streams that carry events: requests are decoded as usual, replies are bytes.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures::Stream;
use futures::stream::BoxStream;
use http::{HeaderMap, HeaderValue};
use prost::Message;
use tonic::body::Body;
use tonic::codec::BufferSettings;
use tonic::metadata::MetadataMap;
use tonic::transport::server::TcpConnectInfo;
use tonic::{Status, Streaming};
use tonic_prost::ProstCodec;

use super::opening;
use crate::partition::KeyUse;
use crate::status;

/// What a call says about itself, beside its messages.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub(super) metadata: MetadataMap,
    /// `host:port` of the other side.
    pub(super) remote: String,
}

/// Takes a request apart: who calls, and what it sends.
pub(super) fn open(request: http::Request<Body>) -> (Call, Body) {
    let (head, body) = request.into_parts();
    let remote = head.extensions.get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr);
    let remote = remote.map_or_else(String::new, |address| address.to_string());
    (Call { metadata: MetadataMap::from_headers(head.headers), remote }, body)
}

/// The messages in a body, each of at most `largest` bytes, and the first always small.
pub(super) fn messages<T: Message + Default + 'static>(body: Body, largest: usize) -> Streaming<T> {
    let decoder = ProstCodec::<T, T>::raw_decoder(BufferSettings::new(64 << 10, 256 << 10));
    Streaming::new_request(decoder, opening::limited(body), None, Some(largest))
}

/// One or more whole gRPC messages on their way to the transport.
pub(super) struct Frame {
    bytes: Bytes,
    /// Of events: their key, which stays in use until they are handed over.
    in_use: Option<KeyUse>,
}

impl Frame {
    /// Events that were opened under the key in use.
    ///
    /// Nothing may wait between this and the transport, or a slow client would keep a revoke waiting: read, open and encode only
    /// when the transport asks for more.
    pub(super) fn opened(bytes: Bytes, in_use: KeyUse) -> Self {
        Self { bytes, in_use: Some(in_use) }
    }

    /// The last moment before the bytes are the transport's: under a key that died, or a lease that ended, they are not.
    fn hand_over(self) -> Result<Bytes, Status> {
        match self.in_use.as_ref().map_or(Ok(()), |in_use| in_use.check()) {
            Ok(()) => Ok(self.bytes),
            Err(error) => Err(status::key_failed(&error)),
        }
    }
}

/// Messages without events in them.
impl From<Bytes> for Frame {
    fn from(bytes: Bytes) -> Self {
        Self { bytes, in_use: None }
    }
}

/// What a call is answered with; an error ends it with its status.
pub(super) type Frames = BoxStream<'static, Result<Frame, Status>>;

/// A reply that streams `frames`.
pub(super) fn reply(frames: Frames) -> http::Response<Body> {
    let mut response = http::Response::new(Body::new(FrameBody { frames: Some(frames) }));
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

struct FrameBody {
    frames: Option<Frames>,
}

impl hyper::body::Body for FrameBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, Status>>> {
        let Some(frames) = self.frames.as_mut() else { return Poll::Ready(None) };
        let next = std::task::ready!(Pin::new(frames).poll_next(cx));
        let status = match next.map(|frame| frame.and_then(Frame::hand_over)) {
            Some(Ok(bytes)) => return Poll::Ready(Some(Ok(hyper::body::Frame::data(bytes)))),
            Some(Err(status)) => status,
            None => Status::ok(""),
        };
        // Whatever the stream holds (keys in use, sealed batches) is released with the last byte, not with the connection.
        self.frames = None;
        let mut trailers = HeaderMap::new();
        if status.add_header(&mut trailers).is_err() {
            trailers.insert("grpc-status", HeaderValue::from_static("13"));
        }
        Poll::Ready(Some(Ok(hyper::body::Frame::trailers(trailers))))
    }
}

/// Appends a message with its gRPC prefix.
pub(super) fn put_message(message: &impl Message, out: &mut BytesMut) {
    let length = message.encoded_len();
    put_prefix(length, out);
    message.encode_raw(out);
}

/// Appends the prefix of a message of `length` bytes: not compressed, then its length.
pub(super) fn put_prefix(length: usize, out: &mut BytesMut) {
    out.reserve(5 + length);
    out.put_u8(0);
    out.put_u32(length as u32);
}

/// One message as a frame.
pub(super) fn message(message: &impl Message) -> Bytes {
    let mut out = BytesMut::new();
    put_message(message, &mut out);
    out.freeze()
}
