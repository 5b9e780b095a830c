//! gRPC by hand, for the streams that carry events: requests are decoded as usual, replies are bytes.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures::Stream;
use futures::stream::BoxStream;
use http::{HeaderMap, HeaderValue};
use hyper::body::Frame;
use prost::Message;
use tonic::body::Body;
use tonic::codec::BufferSettings;
use tonic::metadata::MetadataMap;
use tonic::transport::server::TcpConnectInfo;
use tonic::{Status, Streaming};
use tonic_prost::ProstCodec;

use super::opening;

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

/// Frames, each one or more whole gRPC messages; an error ends the call with its status.
pub(super) type Frames = BoxStream<'static, Result<Bytes, Status>>;

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

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some(frames) = self.frames.as_mut() else { return Poll::Ready(None) };
        let status = match std::task::ready!(Pin::new(frames).poll_next(cx)) {
            Some(Ok(bytes)) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
            Some(Err(status)) => status,
            None => Status::ok(""),
        };
        // Whatever the stream holds (keys in use, sealed batches) is released with the last byte, not with the connection.
        self.frames = None;
        let mut trailers = HeaderMap::new();
        if status.add_header(&mut trailers).is_err() {
            trailers.insert("grpc-status", HeaderValue::from_static("13"));
        }
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
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
