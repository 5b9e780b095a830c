//! Ensign's Rust SDK.
//!
//! ```no_run
//! use ensign_client::{Client, CredentialsFile, Event, Options, PublisherOptions, Start, SubscriberOptions};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let file = CredentialsFile::read("ensign-dev.json".as_ref())?;
//! let (options, _admin) = Options::from_file(file);
//! let client = Client::connect(options)?;
//! client.create_topic("greetings").await?;
//!
//! let mut greetings = client.subscribe("greetings", Start::Live, SubscriberOptions::default()).await?;
//! let publisher = client.publisher("greetings", PublisherOptions::default()).await?;
//! let ack = publisher.publish(Event::new("hello")).await?.await?;
//! println!("on the disks of a majority since {:?}", ack.committed);
//! println!("{:?}", greetings.next().await?.event()?.data);
//! # Ok(())
//! # }
//! ```
//!
//! [`Client`] is a cheap handle. A [`Publisher`] and a [`Subscriber`] each keep one stream open to one topic and replace it
//! when it breaks: what was acknowledged is stored once, what is delivered comes in order and once. Calls that read are
//! repeated on another node when one fails; calls that write are repeated only if nothing can have happened.
//!
//! Not here: anything that a server does. This crate knows the public gRPC API and the login endpoints, and nothing else.

mod admin;
mod backoff;
mod client;
mod connection;
mod consistency;
mod credentials;
mod error;
mod event;
mod options;
mod publish;
mod query;
mod random;
mod subscribe;
mod token;
mod topics;

pub use admin::{Admin, REVOKE_TIMEOUT, Revoke, Ring, Sealing};
pub use client::{Client, NodeState};
pub use consistency::Consistency;
pub use credentials::{Credentials, CredentialsError, CredentialsFile};
pub use error::{CallError, ConnectError};
pub use event::{DecodeEventError, Delivery, EVENT_BYTES_MAX, Event, EventType};
pub use options::{BeginWith, Options};
pub use publish::{Ack, PublishError, Publisher, PublisherOptions, Receipt};
pub use query::QueryResults;
pub use subscribe::{Start, SubscribeError, Subscriber, SubscriberOptions};
pub use token::AuthError;
pub use topics::{Place, TOPICS_BATCH_BYTES_MAX, TOPICS_BATCH_MAX, Topic};

/// Administrative messages.
pub use ensign_proto::pb::admin::v1 as admin_api;
/// What a project holds.
pub use ensign_proto::pb::ensign::v1beta1::ProjectInfo;
/// Where a topic is in its life.
pub use ensign_proto::pb::ensign::v1beta1::TopicState;
/// A schema's name and version, as counters name it.
pub use ensign_proto::pb::ensign::v1beta1::Type as EventSchema;
/// Why a server refused an event.
pub use ensign_proto::pb::ensign::v1beta1::nack::Code as NackCode;
/// What a node says of itself.
pub use ensign_proto::pb::ensign::v1beta1::service_state::Status as NodeCondition;
/// Payload formats.
pub use ensign_proto::pb::mimetype::v1beta1::Mime;
