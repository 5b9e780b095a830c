//! Making tokens.

use std::time::Duration;

use tokio::time::timeout;
use tracing::warn;
use ulid::Ulid;

use super::service::{Identity, LoginError, TokenPair, lock};
use super::token::RawClaims;
use crate::catalog::ApiKey;

/// How long a pair of tokens may wait for its turn to be signed.
const SIGNING_DEADLINE: Duration = Duration::from_secs(5);

impl Identity {
    /// Makes a pair of tokens.
    pub(super) async fn issue(&self, key: &ApiKey, last_login: Option<u64>) -> Result<TokenPair, LoginError> {
        let taken = lock(&self.inner.limits).issue(*key.id.as_bytes(), self.inner.clock.boot());
        if let Err(retry_after) = taken {
            return Err(LoginError::Busy { retry_after });
        }
        let now = self.inner.clock.wall();
        let signer = self.inner.signing.signer(&*self.inner.secrets, now).await.map_err(|error| {
            warn!(%error, "no tokens can be made");
            LoginError::Unavailable
        })?;
        let (access, refresh) = self.claims(key);
        let turn = timeout(SIGNING_DEADLINE, self.inner.signing_slots.acquire()).await;
        let Ok(Ok(_slot)) = turn else { return Err(LoginError::Busy { retry_after: Duration::from_secs(1) }) };
        let signed =
            tokio::task::spawn_blocking(move || Some((signer.sign(&access).ok()?, signer.sign(&refresh).ok()?))).await;
        let Some((access, refresh)) = signed.ok().flatten() else {
            warn!("a token could not be signed");
            return Err(LoginError::Unavailable);
        };
        Ok(TokenPair { access, refresh, last_login })
    }

    fn claims(&self, key: &ApiKey) -> (RawClaims, RawClaims) {
        let config = &self.inner.config;
        let now = self.inner.clock.wall();
        let mut random = [0; 10];
        self.inner.rng.fill(&mut random);
        let jti = Ulid::from_parts(now.as_millis(), random.iter().fold(0, |n, byte| n << 8 | u128::from(*byte)));
        let iat = now.as_secs();
        let exp = iat + config.access_ttl.as_secs();
        let access = RawClaims {
            iss: config.issuer.clone(),
            aud: vec![config.audience.clone()],
            sub: key.id.to_string(),
            jti: jti.to_string().to_ascii_lowercase(),
            iat,
            nbf: iat,
            exp,
            org: key.org.to_string(),
            project: key.project.map(|project| project.to_string()),
            permissions: Some(key.permissions.to_texts().into_iter().map(str::to_owned).collect()),
        };
        let refresh = RawClaims {
            aud: vec![config.audience.clone(), config.refresh_audience()],
            nbf: exp.saturating_sub(config.refresh_overlap.as_secs()).max(iat),
            exp: iat + config.refresh_ttl.as_secs(),
            permissions: None,
            ..access.clone()
        };
        (access, refresh)
    }
}
