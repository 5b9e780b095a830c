//! Between nodes: the way to the books, and the way in.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::pb::peer::v1 as pb;
use ensign_proto::pb::peer::v1::quota_client::QuotaClient;
use ensign_proto::pb::peer::v1::quota_server::{Quota, QuotaServer};
use ensign_proto::{NodeId, ProjectId};
use futures::future::BoxFuture;
use tonic::{Request, Response, Status};

use super::{QuotaLink, Quotas, Reported, Take, Taken, Total, Use};
use crate::partition::forward::Channels;
use crate::peers::CallingNode;

/// The largest message: what ten thousand projects use, and room to spare.
const MESSAGE_MAX: usize = 4 << 20;

/// Calls [`Quota`] on other nodes.
#[derive(Clone)]
pub struct PeerQuota(Arc<dyn Channels>);

impl fmt::Debug for PeerQuota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PeerQuota")
    }
}

impl PeerQuota {
    /// Over these connections.
    pub fn new(channels: Arc<dyn Channels>) -> Self {
        Self(channels)
    }

    fn client(&self, leader: NodeId) -> Result<QuotaClient<crate::peers::PeerChannel>, String> {
        let channel = self.0.control(leader).ok_or("it is not a node of this cluster")?;
        Ok(QuotaClient::new(channel).max_decoding_message_size(MESSAGE_MAX).max_encoding_message_size(MESSAGE_MAX))
    }
}

fn raw(project: ProjectId) -> Bytes {
    Bytes::copy_from_slice(project.as_bytes())
}

fn project(bytes: &[u8]) -> Result<ProjectId, Status> {
    ProjectId::try_from(bytes).map_err(|error| Status::invalid_argument(error.to_string()))
}

impl QuotaLink for PeerQuota {
    fn take(&self, leader: NodeId, take: Take) -> BoxFuture<'static, Result<Taken, String>> {
        let client = self.client(leader);
        Box::pin(async move {
            let request = pb::TakeRequest { project_id: raw(take.project), events: take.events, bytes: take.bytes };
            let reply = client?.take(request).await.map_err(|status| status.to_string())?.into_inner();
            match reply.result {
                Some(pb::take_reply::Result::Taken(true)) => Ok(Taken::All),
                Some(pb::take_reply::Result::WaitMs(ms)) => Ok(Taken::Wait(Duration::from_millis(ms))),
                Some(pb::take_reply::Result::NotLeader(_)) => Ok(Taken::NotLeader),
                Some(pb::take_reply::Result::Taken(false)) | None => Err("an answer that says nothing".to_owned()),
            }
        })
    }

    fn report(
        &self,
        leader: NodeId,
        uses: Vec<(ProjectId, Use)>,
    ) -> BoxFuture<'static, Result<Option<Reported>, String>> {
        let client = self.client(leader);
        Box::pin(async move {
            let projects = uses.iter().map(|(project, used)| pb::ProjectUse {
                project_id: raw(*project),
                stored_bytes: used.stored_bytes,
                streams: used.streams,
                events_per_second: used.events_per_second,
                bytes_per_second: used.bytes_per_second,
            });
            let request = pb::ReportRequest { projects: projects.collect() };
            let reply = client?.report(request).await.map_err(|status| status.to_string())?.into_inner();
            if reply.not_leader {
                return Ok(None);
            }
            let stored = reply.stored.iter().map(|total| Ok((project(&total.project_id)?, total.stored_bytes)));
            let stored = stored.collect::<Result<_, Status>>().map_err(|status| status.to_string())?;
            Ok(Some(Reported { complete: reply.complete, stored }))
        })
    }

    fn usage(
        &self,
        leader: NodeId,
        projects: Vec<ProjectId>,
    ) -> BoxFuture<'static, Result<Option<Vec<Total>>, String>> {
        let client = self.client(leader);
        Box::pin(async move {
            let asked = projects.len();
            let request = pb::UsageRequest { project_ids: projects.into_iter().map(raw).collect() };
            let reply = client?.usage(request).await.map_err(|status| status.to_string())?.into_inner();
            if reply.not_leader || !reply.complete || reply.totals.len() != asked {
                return Ok(None);
            }
            let total = |total: &pb::ProjectTotal| Total {
                sum: Use {
                    stored_bytes: total.stored_bytes,
                    streams: total.streams,
                    events_per_second: total.events_per_second,
                    bytes_per_second: total.bytes_per_second,
                },
                streams_of_busiest_node: total.streams_of_busiest_node,
            };
            Ok(Some(reply.totals.iter().map(total).collect()))
        })
    }
}

/// Serves [`Quota`] to other nodes.
#[derive(Debug, Clone)]
pub struct QuotaService(Quotas);

impl QuotaService {
    /// The service, ready to be added to the peer server, whose gate says who calls.
    pub fn server(quotas: Quotas) -> QuotaServer<Self> {
        QuotaServer::new(Self(quotas)).max_decoding_message_size(MESSAGE_MAX).max_encoding_message_size(MESSAGE_MAX)
    }
}

#[tonic::async_trait]
impl Quota for QuotaService {
    async fn take(&self, request: Request<pb::TakeRequest>) -> Result<Response<pb::TakeReply>, Status> {
        let request = request.into_inner();
        let take = Take { project: project(&request.project_id)?, events: request.events, bytes: request.bytes };
        let result = match self.0.serve_take(take) {
            Taken::All => pb::take_reply::Result::Taken(true),
            // Rounded up: asking too early would only mean asking twice.
            Taken::Wait(wait) => {
                pb::take_reply::Result::WaitMs(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).saturating_add(1))
            }
            Taken::NotLeader => pb::take_reply::Result::NotLeader(true),
        };
        Ok(Response::new(pb::TakeReply { result: Some(result) }))
    }

    async fn report(&self, request: Request<pb::ReportRequest>) -> Result<Response<pb::ReportReply>, Status> {
        let calling = request.extensions().get::<CallingNode>().map(|calling| calling.0);
        let from = calling.ok_or_else(|| Status::unauthenticated("peers must show a certificate"))?;
        let uses = request.get_ref().projects.iter().map(|used| {
            let uses = Use {
                stored_bytes: used.stored_bytes,
                streams: used.streams,
                events_per_second: used.events_per_second,
                bytes_per_second: used.bytes_per_second,
            };
            Ok((project(&used.project_id)?, uses))
        });
        let reported = self.0.serve_report(from, uses.collect::<Result<_, Status>>()?);
        let Some(Reported { complete, stored }) = reported else {
            return Ok(Response::new(pb::ReportReply { not_leader: true, ..pb::ReportReply::default() }));
        };
        let total = |(project, stored_bytes)| pb::StoredTotal { project_id: raw(project), stored_bytes };
        let stored = stored.into_iter().map(total).collect();
        Ok(Response::new(pb::ReportReply { not_leader: false, complete, stored }))
    }

    async fn usage(&self, request: Request<pb::UsageRequest>) -> Result<Response<pb::UsageReply>, Status> {
        let projects = request.get_ref().project_ids.iter().map(|id| project(id));
        let totals = self.0.serve_usage(&projects.collect::<Result<Vec<_>, Status>>()?);
        let complete = totals.is_some();
        let totals = totals.unwrap_or_default().into_iter().map(|total| pb::ProjectTotal {
            stored_bytes: total.sum.stored_bytes,
            streams: total.sum.streams,
            streams_of_busiest_node: total.streams_of_busiest_node,
            events_per_second: total.sum.events_per_second,
            bytes_per_second: total.sum.bytes_per_second,
        });
        Ok(Response::new(pb::UsageReply { not_leader: false, complete, totals: totals.collect() }))
    }
}
