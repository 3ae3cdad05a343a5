//! An apt with sources, lists and packages of its own, for what this machine's apt is not configured for.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::process::{capture, entries};

/// Names a Debian mirror, for machines whose apt has none.
const MIRROR: &str = "GATEWAY_DEBIAN_MIRROR";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Of the packages.
pub(crate) const ARCHITECTURE: &str = "amd64";

/// Some suites of Debian, with lists that were read a moment ago.
pub(crate) struct Apt {
    directory: PathBuf,
}

impl Apt {
    /// Reads the lists of `suites` into `directory`.
    pub(crate) fn open(directory: &Path, suites: &[&str]) -> Result<Self> {
        ensure!(Path::new(KEYRING).exists(), "{KEYRING} is missing: install debian-archive-keyring");
        for part in ["lists/partial", "cache/archives/partial"] {
            let part = directory.join(part);
            fs::create_dir_all(&part).with_context(|| format!("cannot create {}", part.display()))?;
        }
        let directory = fs::canonicalize(directory)?;
        let (mirror, place) = (mirror()?, directory.display());
        let options = format!("arch={ARCHITECTURE} lang=none target=Packages signed-by={KEYRING}");
        let sources: Vec<String> =
            suites.iter().map(|suite| format!("deb [{options}] {mirror} {suite} main\n")).collect();
        write(&directory.join("sources.list"), &sources.concat())?;
        let settings = format!(
            "Dir::Etc::SourceList \"{place}/sources.list\";\nDir::Etc::SourceParts \"/dev/null\";\n\
             Dir::State::Lists \"{place}/lists\";\nDir::Cache \"{place}/cache\";\nAPT::Sandbox::User \"root\";\n"
        );
        write(&directory.join("apt.conf"), &settings)?;
        let apt = Self { directory };
        capture(apt.command("apt-get").args(["-qq", "update"]))?;
        Ok(apt)
    }

    /// Names of packages that begin with `prefix`.
    pub(crate) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let names = capture(self.command("apt-cache").args(["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// Fetches packages; gives their files, which the next call removes.
    pub(crate) fn download(&self, packages: &[String]) -> Result<Vec<PathBuf>> {
        let place = self.directory.join("packages");
        if place.exists() {
            fs::remove_dir_all(&place).with_context(|| format!("cannot remove {}", place.display()))?;
        }
        fs::create_dir(&place).with_context(|| format!("cannot create {}", place.display()))?;
        capture(self.command("apt-get").current_dir(&place).args(["-qq", "download"]).args(packages))?;
        entries(&place)
    }

    /// Installs packages on this machine, with what they need, from `suite` rather than from the others.
    pub(crate) fn install(&self, packages: &[&str], suite: &str) -> Result<()> {
        let mut command = self.command("apt-get");
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["-qq", "-o", "DPkg::Lock::Timeout=300", "install", "--yes", "--no-install-recommends"])
            .args(["--target-release", suite])
            .args(packages);
        capture(&mut command).map(drop)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.directory.join("apt.conf"));
        command
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// The mirror that this machine's apt uses for Debian.
fn mirror() -> Result<String> {
    if let Some(uri) = env::var_os(MIRROR) {
        return uri.into_string().ok().with_context(|| format!("{MIRROR} is not UTF-8"));
    }
    let uris = capture(Command::new("apt-get").args(["--print-uris", "update"]))?;
    let found = codename().and_then(|codename| archive_of(&uris, &codename));
    found.with_context(|| format!("apt has no mirror of Debian: name one by {MIRROR}"))
}

/// The name of this machine's release.
pub(crate) fn codename() -> Option<String> {
    codename_in(&fs::read_to_string("/etc/os-release").ok()?)
}

fn codename_in(os_release: &str) -> Option<String> {
    let value = os_release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(value.trim_matches('"').to_owned())
}

/// The archive of a suite in what `apt-get --print-uris update` prints: `'URI/dists/SUITE/InRelease' …`.
fn archive_of(uris: &str, suite: &str) -> Option<String> {
    let end = format!("/dists/{suite}/InRelease");
    let mut quoted = uris.lines().filter_map(|line| line.strip_prefix('\'')?.split('\'').next());
    quoted.find_map(|uri| uri.strip_suffix(&end)).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_archive_of_this_release() {
        let uris = "'http://mirror.example/debian/dists/bookworm-updates/InRelease' a 0 \n\
                    'http://mirror.example/debian/dists/bookworm/InRelease' b 0 \n\
                    'http://other.example/dists/bookworm/main/binary-all/Packages.xz' c 0 \n";
        assert_eq!(archive_of(uris, "bookworm").as_deref(), Some("http://mirror.example/debian"));
        assert_eq!(archive_of(uris, "trixie"), None);
    }

    #[test]
    fn reads_the_name_of_the_release() {
        assert_eq!(codename_in("NAME=\"Debian\"\nVERSION_CODENAME=bookworm\n").as_deref(), Some("bookworm"));
        assert_eq!(codename_in("NAME=x\n"), None);
    }
}
