//! Kernels of Debian, unpacked under `target/vm`; nothing is installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{
    apt::{ARCHITECTURE, Apt},
    process::{capture, entries},
};

/// Where kernels are looked for, in this order.
const SUITES: [&str; 4] = ["bookworm", "trixie", "trixie-backports", "sid"];

/// A kernel, unpacked.
#[derive(Debug)]
pub(super) struct Kernel {
    /// What `uname -r` says of it.
    pub(super) release: String,
    /// The file that boots.
    pub(super) image: PathBuf,
    /// The directory of its modules.
    pub(super) modules: PathBuf,
}

impl Kernel {
    /// The newest Debian kernel for virtual machines whose version begins with `series`, such as `6.12`. What was
    /// fetched once is taken from `cache`.
    pub(super) fn provide(series: &str, cache: &Path) -> Result<Self> {
        let place = cache.join("kernels").join(series);
        if !place.exists() {
            fetch(series, cache, &place).with_context(|| format!("cannot get a kernel {series}"))?;
        }
        Self::find(&place).with_context(|| format!("{} is not complete: remove it", place.display()))
    }

    fn find(place: &Path) -> Result<Self> {
        for directory in ["lib/modules", "usr/lib/modules"].map(|directory| place.join(directory)) {
            if !directory.exists() {
                continue;
            }
            let modules = entries(&directory)?.pop().context("no modules in it")?;
            let release = modules.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let images = [place.join(format!("boot/vmlinuz-{release}")), modules.join("vmlinuz")];
            let image = images.into_iter().find(|path| path.is_file()).context("no vmlinuz in it")?;
            return Ok(Self { release, image, modules });
        }
        bail!("no directory of modules in it")
    }
}

fn fetch(series: &str, cache: &Path, place: &Path) -> Result<()> {
    for suite in SUITES {
        eprintln!("vm: looking for a kernel {series} in Debian {suite}");
        let apt = Apt::open(&cache.join("apt").join(suite), &[suite])?;
        let Some(packages) = packages_of(series, &apt.names("linux-")?) else { continue };
        eprintln!("vm: fetching {}", packages.join(" "));
        let half = place.with_extension("part");
        if half.exists() {
            fs::remove_dir_all(&half).with_context(|| format!("cannot remove {}", half.display()))?;
        }
        fs::create_dir_all(&half).with_context(|| format!("cannot create {}", half.display()))?;
        for package in apt.download(&packages)? {
            capture(Command::new("dpkg-deb").arg("--extract").args([&package, &half]))?;
            fs::remove_file(&package).with_context(|| format!("cannot remove {}", package.display()))?;
        }
        return fs::rename(&half, place)
            .with_context(|| format!("cannot move {} to {}", half.display(), place.display()));
    }
    bail!("there is none in {}", SUITES.join(", "))
}

/// The newest kernel of the series among names of packages, and the packages that it is split into: since Linux 7 the
/// package of the image is empty.
fn packages_of(series: &str, names: &[String]) -> Option<Vec<String>> {
    let (begin, end) = (format!("linux-image-{series}."), format!("-cloud-{ARCHITECTURE}"));
    let newest = names
        .iter()
        .filter(|name| name.starts_with(&begin) && name.ends_with(&end))
        .filter_map(|name| name.strip_prefix("linux-image-"))
        .max_by_key(|release| numbers(release))?;
    let parts = ["image", "binary", "modules"].map(|part| format!("linux-{part}-{newest}"));
    Some(parts.into_iter().filter(|part| names.contains(part)).collect())
}

/// The numbers in a release: they order the releases of a series.
fn numbers(release: &str) -> Vec<u32> {
    release.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.to_owned()).collect()
    }

    #[test]
    fn the_newest_kernel_of_a_series() {
        let names = strings(&[
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-50-cloud-amd64",
            "linux-image-6.1.0-50-cloud-amd64-dbg",
            "linux-image-6.1.0-60-amd64",
            "linux-image-6.12.117+deb13-cloud-amd64",
            "linux-image-cloud-amd64",
        ]);
        assert_eq!(packages_of("6.1", &names).unwrap(), ["linux-image-6.1.0-50-cloud-amd64"]);
        assert_eq!(packages_of("6.12", &names).unwrap(), ["linux-image-6.12.117+deb13-cloud-amd64"]);
        assert_eq!(packages_of("5.15", &names), None);
    }

    #[test]
    fn a_kernel_in_several_packages() {
        let names = strings(&[
            "linux-image-7.2.13+deb14-cloud-amd64",
            "linux-binary-7.2.13+deb14-cloud-amd64",
            "linux-modules-7.2.13+deb14-cloud-amd64",
            "linux-modules-7.2.14+deb14-cloud-amd64",
        ]);
        assert_eq!(
            packages_of("7.2", &names).unwrap(),
            ["image", "binary", "modules"].map(|part| format!("linux-{part}-7.2.13+deb14-cloud-amd64"))
        );
    }
}
