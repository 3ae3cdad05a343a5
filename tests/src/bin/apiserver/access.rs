//! Who asks, and what they may: certificates, tokens, and the rules of RBAC manifests.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use serde_json::{Value, json};

use crate::resource::Resource;

/// Whoever shows no credentials.
pub(crate) const ANONYMOUS: &str = "system:anonymous";
/// May do anything, the controls of this server included.
pub(crate) const ADMIN: &str = "admin";
/// The user that RBAC manifests bind.
pub(crate) const GATEWAY: &str = "system:serviceaccount:kube-system:gateway";
/// May read and write all objects, but not the controls: for peers in tests, whose requests have faults too.
const USERS: [&str; 2] = [ADMIN, GATEWAY];

/// Somebody who was recognised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
}

impl User {
    pub(crate) fn is_admin(&self) -> bool {
        self.name == ADMIN
    }

    pub(crate) fn is_anonymous(&self) -> bool {
        self.name == ANONYMOUS
    }
}

/// What identifies users.
#[derive(Debug)]
pub(crate) struct Access {
    by_certificate: HashMap<Vec<u8>, String>,
    by_token: HashMap<String, String>,
    rules: Option<Vec<Rule>>,
}

/// A rule of a role, and where it holds.
#[derive(Clone, Debug)]
struct Rule {
    /// `None` is everywhere.
    namespace: Option<String>,
    groups: Vec<String>,
    resources: Vec<String>,
    names: Vec<String>,
    verbs: Vec<String>,
}

/// What a request wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wish {
    pub(crate) verb: &'static str,
    pub(crate) resource: Resource,
    pub(crate) status: bool,
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Wish {
    /// The resource with its subresource, as rules have it.
    pub(crate) fn resource(&self) -> String {
        let status = if self.status { "/status" } else { "" };
        format!("{}{status}", self.resource.plural())
    }

    /// As the real server refuses it.
    pub(crate) fn forbidden(&self, user: &str) -> String {
        let place = if self.namespace.is_empty() {
            "at the cluster scope".to_owned()
        } else {
            format!("in the namespace {:?}", self.namespace)
        };
        let object = if self.name.is_empty() { String::new() } else { format!(" {:?}", self.name) };
        format!(
            "{}{object} is forbidden: User {user:?} cannot {} resource {:?} in API group {:?} {place}",
            self.resource,
            self.verb,
            self.resource(),
            self.resource.group()
        )
    }
}

impl Access {
    pub(crate) fn certificate(&self, der: &[u8]) -> Option<User> {
        Some(User { name: self.by_certificate.get(der)?.clone() })
    }

    pub(crate) fn token(&self, token: &str) -> Option<User> {
        Some(User { name: self.by_token.get(token)?.clone() })
    }

    /// Whether the rules allow it. Without rules everybody who is known may do everything.
    pub(crate) fn allows(&self, user: &User, wish: &Wish) -> bool {
        if user.is_anonymous() {
            return false;
        }
        let Some(rules) = &self.rules else { return true };
        user.is_admin()
            || rules.iter().any(|rule| {
                let has =
                    |list: &[String], item: &str| list.iter().any(|entry| entry == item || entry == "*");
                rule.namespace.as_ref().is_none_or(|namespace| *namespace == wish.namespace)
                    && has(&rule.groups, wish.resource.group())
                    && has(&rule.resources, &wish.resource())
                    && has(&rule.verbs, wish.verb)
                    && (rule.names.is_empty() || rule.names.contains(&wish.name))
            })
    }

    /// Reads the rules that manifests bind to the gateway's service account.
    pub(crate) fn read_rules(&mut self, path: &Path) -> Result<()> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let documents: Vec<Value> =
            serde_saphyr::from_multiple(&text).with_context(|| format!("{} is no YAML", path.display()))?;
        let roles: BTreeMap<(String, String), &Value> = documents
            .iter()
            .filter(|document| document["kind"] == "ClusterRole" || document["kind"] == "Role")
            .map(|role| ((text_of(&role["kind"]), text_of(&role["metadata"]["name"])), role))
            .collect();
        let mut rules = Vec::new();
        for binding in &documents {
            let namespace = match binding["kind"].as_str() {
                Some("ClusterRoleBinding") => None,
                Some("RoleBinding") => Some(text_of(&binding["metadata"]["namespace"])),
                _ => continue,
            };
            let bound = binding["subjects"].as_array().into_iter().flatten().any(|subject| {
                let account = format!(
                    "system:serviceaccount:{}:{}",
                    text_of(&subject["namespace"]),
                    text_of(&subject["name"])
                );
                account == GATEWAY || subject["name"] == GATEWAY
            });
            let reference = (text_of(&binding["roleRef"]["kind"]), text_of(&binding["roleRef"]["name"]));
            let Some(role) = roles.get(&reference).filter(|_| bound) else { continue };
            rules.extend(role["rules"].as_array().into_iter().flatten().map(|rule| Rule {
                namespace: namespace.clone(),
                groups: texts(&rule["apiGroups"]),
                resources: texts(&rule["resources"]),
                names: texts(&rule["resourceNames"]),
                verbs: texts(&rule["verbs"]),
            }));
        }
        self.rules = Some(rules);
        Ok(())
    }
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().map(text_of).collect()
}

struct Authority {
    params: CertificateParams,
    key: KeyPair,
    der: CertificateDer<'static>,
}

/// The authority of this directory: that of an earlier run, or a new one.
fn authority(directory: &Path) -> Result<Authority> {
    let (certificate, key) = (directory.join("ca.pem"), directory.join("ca.key"));
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "test-ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    if key.exists() {
        let key = KeyPair::from_pem(&fs::read_to_string(&key)?)?;
        let der = CertificateDer::from_pem_file(&certificate).context("cannot read ca.pem")?;
        return Ok(Authority { params, key, der });
    }
    let pair = KeyPair::generate()?;
    let made = params.self_signed(&pair)?;
    write(&certificate, &made.pem())?;
    write(&key, &pair.serialize_pem())?;
    Ok(Authority { der: made.der().clone(), params, key: pair })
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Certificates for the server at `address` and for its users, and their kubeconfigs in `directory`.
pub(crate) fn set_up(directory: &Path, address: IpAddr, port: u16) -> Result<(Access, Arc<ServerConfig>)> {
    let authority = authority(directory)?;
    let issuer = Issuer::from_params(&authority.params, &authority.key);
    let mut access = Access { by_certificate: HashMap::new(), by_token: HashMap::new(), rules: None };

    let mut params = CertificateParams::new(vec!["localhost".to_owned()])?;
    params.subject_alt_names.push(SanType::IpAddress(address));
    if !address.is_loopback() {
        params.subject_alt_names.push(SanType::IpAddress(IpAddr::from([127, 0, 0, 1])));
    }
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let server_key = KeyPair::generate()?;
    let server = params.signed_by(&server_key, &issuer)?;

    for user in USERS {
        let short = user.rsplit(':').next().unwrap_or(user);
        let (certificate, key) =
            (directory.join(format!("{short}.pem")), directory.join(format!("{short}.key")));
        if !key.exists() {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, user);
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            let pair = KeyPair::generate()?;
            write(&certificate, &params.signed_by(&pair, &issuer)?.pem())?;
            write(&key, &pair.serialize_pem())?;
        }
        let der = CertificateDer::from_pem_file(&certificate)
            .with_context(|| format!("cannot read {}", certificate.display()))?;
        access.by_certificate.insert(der.to_vec(), user.to_owned());
        let token = format!("token-of-{short}");
        access.by_token.insert(token.clone(), user.to_owned());
        write(&directory.join(format!("{short}.token")), &token)?;
        let paths = Paths { directory, address, port };
        let by_certificate = json!({ "client-certificate": certificate, "client-key": key });
        paths.write(&format!("{short}.kubeconfig"), &by_certificate)?;
        paths.write(&format!("{short}-token.kubeconfig"), &json!({ "token": token }))?;
    }

    let mut roots = RootCertStore::empty();
    roots.add(authority.der.clone())?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![server.der().clone(), authority.der],
            PrivateKeyDer::from(PrivatePkcs8KeyDer::from(server_key.serialize_der())),
        )?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok((access, Arc::new(config)))
}

struct Paths<'a> {
    directory: &'a Path,
    address: IpAddr,
    port: u16,
}

impl Paths<'_> {
    fn write(&self, name: &str, user: &Value) -> Result<()> {
        let server = std::net::SocketAddr::new(self.address, self.port);
        let authority: PathBuf = self.directory.join("ca.pem");
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{
                "name": "test",
                "cluster": { "server": format!("https://{server}"), "certificate-authority": authority },
            }],
            "users": [{ "name": "user", "user": user }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "user" } }],
            "current-context": "test",
        });
        write(&self.directory.join(name), &serde_json::to_string_pretty(&config)?)
    }
}
