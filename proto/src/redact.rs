//! Messages that carry a secret print everything but the secret, wherever they end up in a log.

use std::fmt;

use crate::pb::admin::v1::CreateApiKeyReply;
use crate::pb::vault::v1::PutSecretRequest;

impl fmt::Debug for PutSecretRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PutSecretRequest")
            .field("kind", &self.kind)
            .field("id", &self.id)
            .field("expected", &self.expected)
            .field("secret", &format_args!("{} bytes", self.secret.len()))
            .finish()
    }
}

impl fmt::Debug for CreateApiKeyReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CreateApiKeyReply").field("key", &self.key).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::vault::v1::{Request, request};

    #[test]
    fn a_secret_is_not_printed() {
        let put =
            PutSecretRequest { secret: b"recognisable".as_slice().into(), kind: 2, ..PutSecretRequest::default() };
        let request = Request { actor: "node 1".to_owned(), call: Some(request::Call::PutSecret(put)) };
        let text = format!("{request:?}");
        assert!(text.contains("12 bytes") && !text.contains("recognisable"), "{text}");
    }
}
