//! `ensign receipt`: what a third party does with a receipt, without a cluster and without trusting one.
//!
//! ```text
//! pinned fingerprint = thumbprint of a key in the set ── its endorsement of the next ──> … ──> the key that signed the receipt
//! ```

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use super::args::{Output, ReceiptCommand, VerifyArgs};
use super::exit::UsageError;
use super::output::{json, line};

const RECEIPT: &str = "ensign-receipt+jws";
const ENDORSEMENT: &str = "ensign-receipt-key+jws";
/// A set of keys, or a file of receipts, is some thousand bytes.
const INPUT_MAX: u64 = 16 << 20;
const FETCH_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a receipt is not believed.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum Untrusted {
    /// Nothing in the set has the fingerprint that was pinned.
    #[error(
        "no key in {keys} has the fingerprint {pin}: the keys are of another cluster, or are not the ones that were published; its keys are {found}"
    )]
    NotPinned { keys: String, pin: String, found: String },
    /// The key before it does not vouch for a key.
    #[error("receipt key {number} ({kid}) is not vouched for by the key before it: {why}")]
    Broken { number: u32, kid: String, why: &'static str },
    /// A key is not what its name says.
    #[error("a key in {keys} is called {kid}, and its fingerprint is another one: the set was altered")]
    Misnamed { keys: String, kid: String },
    /// The receipt names a key that is not in the chain.
    #[error(
        "line {line}: the receipt is signed with a key ({kid}) that is not in the set of keys, or is older than the one that is trusted"
    )]
    UnknownKey { line: usize, kid: String },
    /// It is no receipt.
    #[error("line {line}: this is no receipt: {why}")]
    NoReceipt { line: usize, why: &'static str },
    /// The signature does not fit.
    #[error(
        "line {line}: the signature does not fit: the receipt was altered, or was signed with another key than it names"
    )]
    BadSignature { line: usize },
}

#[derive(Debug, Deserialize)]
struct Set {
    keys: Vec<Jwk>,
}

/// What a verifier reads of a key.
#[derive(Debug, Deserialize)]
struct Jwk {
    kid: String,
    x: String,
    #[serde(default)]
    number: u32,
    #[serde(default)]
    endorsement: String,
}

#[derive(Debug, Deserialize)]
struct Header {
    alg: String,
    typ: String,
    kid: String,
}

#[derive(Debug, Deserialize)]
struct Endorsed {
    kid: String,
    number: u32,
}

/// A receipt whose signature fits.
#[derive(Debug, Serialize)]
struct Verified {
    valid: bool,
    kid: String,
    receipt: Value,
}

/// The keys that a pinned fingerprint leads to.
#[derive(Debug)]
struct Chain(BTreeMap<String, Vec<u8>>);

/// A JWS in compact form, taken apart and not verified.
struct Jws<'a> {
    header: Header,
    signed: &'a str,
    payload: Vec<u8>,
    signature: Vec<u8>,
}

impl<'a> Jws<'a> {
    fn parse(text: &'a str, typ: &str) -> Result<Self, &'static str> {
        let (signed, signature) = text.rsplit_once('.').ok_or("it has no three parts with dots between")?;
        let (header, payload) = signed.split_once('.').ok_or("it has no three parts with dots between")?;
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| "a part of it is not base64url");
        let header: Header =
            serde_json::from_slice(&decode(header)?).map_err(|_| "its header does not name alg, typ and kid")?;
        if header.alg != "EdDSA" {
            return Err("its algorithm is not EdDSA");
        }
        if header.typ != typ {
            return Err("its type is another one");
        }
        Ok(Self { header, signed, payload: decode(payload)?, signature: decode(signature)? })
    }

    fn is_signed_by(&self, key: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, key).verify(self.signed.as_bytes(), &self.signature).is_ok()
    }
}

/// RFC 7638.
fn thumbprint(x: &str) -> String {
    URL_SAFE_NO_PAD.encode(Sha256::digest(format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{x}"}}"#)))
}

impl Chain {
    /// What can be trusted of a set, when one of its keys is.
    fn from(set: &Set, pin: &str, keys: &str) -> Result<Self, Untrusted> {
        for key in &set.keys {
            if thumbprint(&key.x) != key.kid {
                return Err(Untrusted::Misnamed { keys: keys.to_owned(), kid: key.kid.clone() });
            }
        }
        let Some(first) = set.keys.iter().position(|key| key.kid == pin) else {
            let found: Vec<_> = set.keys.iter().map(|key| key.kid.as_str()).collect();
            let found = if found.is_empty() { "none".to_owned() } else { found.join(", ") };
            return Err(Untrusted::NotPinned { keys: keys.to_owned(), pin: pin.to_owned(), found });
        };
        let mut trusted = BTreeMap::new();
        let mut before: Option<(&Jwk, Vec<u8>)> = None;
        for key in &set.keys[first..] {
            let broken = |why| Untrusted::Broken { number: key.number, kid: key.kid.clone(), why };
            let public = URL_SAFE_NO_PAD.decode(&key.x).map_err(|_| broken("it is not base64url"))?;
            if let Some((last, last_public)) = &before {
                let endorsement = Jws::parse(&key.endorsement, ENDORSEMENT).map_err(&broken)?;
                if endorsement.header.kid != last.kid || !endorsement.is_signed_by(last_public) {
                    return Err(broken("the signature does not fit"));
                }
                let said: Endorsed =
                    serde_json::from_slice(&endorsement.payload).map_err(|_| broken("it does not say for which"))?;
                if said.kid != key.kid || said.number != key.number {
                    return Err(broken("it is for another key"));
                }
            }
            trusted.insert(key.kid.clone(), public.clone());
            before = Some((key, public));
        }
        Ok(Self(trusted))
    }

    fn verify(&self, line: usize, text: &str) -> Result<Verified, Untrusted> {
        let jws = Jws::parse(text, RECEIPT).map_err(|why| Untrusted::NoReceipt { line, why })?;
        let Some(key) = self.0.get(&jws.header.kid) else {
            return Err(Untrusted::UnknownKey { line, kid: jws.header.kid });
        };
        if !jws.is_signed_by(key) {
            return Err(Untrusted::BadSignature { line });
        }
        let why = "its content is not JSON";
        let receipt = serde_json::from_slice(&jws.payload).map_err(|_| Untrusted::NoReceipt { line, why })?;
        Ok(Verified { valid: true, kid: jws.header.kid, receipt })
    }
}

/// Runs one of the receipt commands.
pub(super) async fn run(command: ReceiptCommand) -> anyhow::Result<()> {
    match command {
        ReceiptCommand::Verify(args) => verify(args).await,
    }
}

async fn verify(args: VerifyArgs) -> anyhow::Result<()> {
    let text = read(&args.file)?;
    let set: Set = serde_json::from_str(&keys(&args).await?)
        .map_err(|error| UsageError(format!("{} is no set of receipt keys: {error}", args.keys)))?;
    let chain = Chain::from(&set, args.fingerprint.trim(), &args.keys)?;
    let mut verified = Vec::new();
    for (number, receipt) in (1..).zip(text.lines()) {
        if !receipt.trim().is_empty() {
            verified.push(chain.verify(number, receipt.trim())?);
        }
    }
    if verified.is_empty() {
        return Err(UsageError(format!("{} holds no receipt", args.file.display())).into());
    }
    match args.output {
        Output::Json => json(&verified),
        Output::Human => verified.iter().try_for_each(|it| line(sentence(it))),
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    let unreadable = |error: std::io::Error| UsageError(format!("cannot read {}: {error}", path.display()));
    let mut text = String::new();
    if path.as_os_str() == "-" {
        std::io::stdin().take(INPUT_MAX).read_to_string(&mut text).map_err(unreadable)?;
    } else {
        let file = std::fs::File::open(path).map_err(unreadable)?;
        file.take(INPUT_MAX).read_to_string(&mut text).map_err(unreadable)?;
    }
    Ok(text)
}

async fn keys(args: &VerifyArgs) -> anyhow::Result<String> {
    let url = &args.keys;
    if !url.starts_with("http://") && !url.starts_with("https://") {
        return read(Path::new(url));
    }
    let mut client = reqwest::Client::builder().timeout(FETCH_TIMEOUT);
    if let Some(path) = &args.ca_file {
        let pem =
            std::fs::read(path).map_err(|error| UsageError(format!("cannot read {}: {error}", path.display())))?;
        for certificate in reqwest::Certificate::from_pem_bundle(&pem)? {
            client = client.add_root_certificate(certificate);
        }
    }
    let reply = client.build()?.get(url).send().await.with_context(|| format!("cannot fetch {url}"))?;
    let reply = reply.error_for_status().with_context(|| format!("cannot fetch {url}"))?;
    reply.text().await.with_context(|| format!("cannot fetch {url}"))
}

/// What a person wants to know at one look.
fn sentence(verified: &Verified) -> String {
    let receipt = &verified.receipt;
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let list = |value: &Value| {
        let items: Vec<String> = value.as_array().into_iter().flatten().map(text).collect();
        if items.is_empty() { "none".to_owned() } else { items.join(", ") }
    };
    let mut lines = vec![format!("valid: {} (signed with key {})", text(&receipt["kind"]), verified.kid)];
    for name in ["cluster", "project", "ring"] {
        lines.push(format!("  {name}: {}", text(&receipt[name])));
    }
    for version in receipt["versions"].as_array().into_iter().flatten() {
        lines.push(format!("  version {}: key id {}", version["n"], text(&version["kek_id"])));
    }
    lines.push(format!("  time: {}, by order of {}", text(&receipt["time"]), text(&receipt["actor"])));
    let basis = &receipt["basis"];
    if basis.is_object() {
        let (gave, waited) = (list(&basis["surrendered"]), list(&basis["waited"]));
        lines.push(format!(
            "  nodes that gave it up: {gave}; that were waited for until their lease was over: {waited}"
        ));
    }
    if let Some(through) = receipt["erased_through"].as_object() {
        let through: Vec<_> = through.iter().map(|(node, index)| format!("{node} through {index}")).collect();
        let missing = if receipt["missing"].is_array() { list(&receipt["missing"]) } else { "not known".to_owned() };
        lines.push(format!("  erased by: {}; missing: {missing}", through.join(", ")));
    }
    let audit = &receipt["audit"];
    lines.push(format!("  record {} of the vault: {}", audit["seq"], text(&audit["this"])));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};

    use super::*;

    struct Key(Ed25519KeyPair);

    impl Key {
        fn new(seed: u8) -> Self {
            Self(Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap())
        }

        fn x(&self) -> String {
            URL_SAFE_NO_PAD.encode(self.0.public_key().as_ref())
        }

        fn kid(&self) -> String {
            thumbprint(&self.x())
        }

        fn sign(&self, typ: &str, payload: &str) -> String {
            let header = format!(r#"{{"alg":"EdDSA","typ":"{typ}","kid":"{}"}}"#, self.kid());
            let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(payload));
            format!("{signed}.{}", URL_SAFE_NO_PAD.encode(self.0.sign(signed.as_bytes()).as_ref()))
        }

        fn jwk(&self, number: u32, before: Option<&Self>) -> Jwk {
            let said = format!(r#"{{"v":1,"kid":"{}","number":{number}}}"#, self.kid());
            let endorsement = before.map_or_else(String::new, |before| before.sign(ENDORSEMENT, &said));
            Jwk { kid: self.kid(), x: self.x(), number, endorsement }
        }
    }

    fn set() -> ([Key; 3], Set) {
        let keys = [Key::new(1), Key::new(2), Key::new(3)];
        let set =
            Set { keys: vec![keys[0].jwk(1, None), keys[1].jwk(2, Some(&keys[0])), keys[2].jwk(3, Some(&keys[1]))] };
        (keys, set)
    }

    #[test]
    fn a_receipt_of_any_key_that_follows_the_pinned_one_is_believed() {
        let (keys, set) = set();
        let chain = Chain::from(&set, &keys[0].kid(), "keys").unwrap();
        for key in &keys {
            let verified = chain.verify(1, &key.sign(RECEIPT, r#"{"kind":"revoked"}"#)).unwrap();
            assert_eq!((verified.kid, &verified.receipt["kind"]), (key.kid(), &Value::from("revoked")));
        }
        let later = Chain::from(&set, &keys[1].kid(), "keys").unwrap();
        let old = later.verify(7, &keys[0].sign(RECEIPT, "{}")).unwrap_err();
        assert!(matches!(old, Untrusted::UnknownKey { line: 7, .. }), "{old}");
    }

    #[test]
    fn what_was_altered_or_comes_from_elsewhere_is_refused_by_its_name() {
        let (keys, set) = set();
        let chain = Chain::from(&set, &keys[0].kid(), "keys").unwrap();
        let good = keys[1].sign(RECEIPT, r#"{"kind":"revoked","epoch":812}"#);
        let parts: Vec<&str> = good.split('.').collect();
        let altered = URL_SAFE_NO_PAD.encode(r#"{"kind":"revoked","epoch":813}"#);
        let altered = [parts[0], &altered, parts[2]].join(".");
        assert_eq!(chain.verify(2, &altered).unwrap_err(), Untrusted::BadSignature { line: 2 });
        // Signed with a foreign key under the name of a known one.
        let foreign = Key::new(9).sign(RECEIPT, "{}");
        let foreign: Vec<&str> = foreign.split('.').collect();
        let named = [parts[0], foreign[1], foreign[2]].join(".");
        assert_eq!(chain.verify(1, &named).unwrap_err(), Untrusted::BadSignature { line: 1 });
        let unknown = Key::new(9).sign(RECEIPT, "{}");
        assert!(matches!(chain.verify(1, &unknown).unwrap_err(), Untrusted::UnknownKey { .. }));
        // What a receipt key says of its successor is no receipt.
        let endorsement = keys[0].sign(ENDORSEMENT, "{}");
        assert!(matches!(chain.verify(1, &endorsement).unwrap_err(), Untrusted::NoReceipt { .. }));
        for text in ["", "a.b", "not a receipt", "..."] {
            assert!(matches!(chain.verify(1, text).unwrap_err(), Untrusted::NoReceipt { .. }), "{text:?}");
        }
    }

    #[test]
    fn a_set_of_keys_that_does_not_lead_from_the_pinned_one_is_refused() {
        let (keys, set) = set();
        let pinned = keys[0].kid();
        assert!(matches!(Chain::from(&set, "else", "keys"), Err(Untrusted::NotPinned { .. })));
        let mut broken = self::set().1;
        broken.keys[2].endorsement = keys[0].jwk(3, None).endorsement;
        assert!(matches!(Chain::from(&broken, &pinned, "keys"), Err(Untrusted::Broken { number: 3, .. })));
        let mut foreign = self::set().1;
        foreign.keys[1] = keys[1].jwk(2, Some(&Key::new(9)));
        assert!(matches!(Chain::from(&foreign, &pinned, "keys"), Err(Untrusted::Broken { number: 2, .. })));
        let mut misnamed = self::set().1;
        misnamed.keys[1].x = Key::new(9).x();
        assert!(matches!(Chain::from(&misnamed, &pinned, "keys"), Err(Untrusted::Misnamed { .. })));
    }
}
