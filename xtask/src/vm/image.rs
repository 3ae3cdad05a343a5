//! The guest's root: an archive that the kernel unpacks into memory.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use cpio::newc::{self, ModeFileType};

use super::modules::Module;
use crate::process::{capture, find};

/// What will be in the guest's root. Paths are relative to it.
#[derive(Clone, Default)]
pub(super) struct Image {
    files: BTreeMap<PathBuf, Content>,
}

#[derive(Clone)]
struct Content {
    data: Vec<u8>,
    is_program: bool,
}

impl Image {
    /// Adds a file.
    pub(super) fn add(&mut self, path: impl AsRef<Path>, data: Vec<u8>) {
        self.insert(path.as_ref(), data, false);
    }

    /// Adds a program without its debug information, and the libraries that it needs. `scratch` is a directory for what
    /// comes up meanwhile.
    pub(super) fn add_program(
        &mut self,
        source: &Path,
        path: impl AsRef<Path>,
        scratch: &Path,
    ) -> Result<()> {
        let stripped = scratch.join("stripped");
        capture(Command::new("strip").arg("-o").args([&stripped, source]))?;
        let data = fs::read(&stripped).with_context(|| format!("cannot read {}", stripped.display()))?;
        self.insert(path.as_ref(), data, true);
        for library in libraries(&capture(Command::new("ldd").arg(source))?) {
            let data = fs::read(library).with_context(|| format!("cannot read {library}"))?;
            self.insert(Path::new(library.trim_start_matches('/')), data, true);
        }
        Ok(())
    }

    /// Adds a program that this machine has installed.
    pub(super) fn add_tool(&mut self, name: &str, scratch: &Path) -> Result<()> {
        let source = find(name).with_context(|| format!("{name} is not installed"))?;
        self.add_program(&source, Path::new("usr/bin").join(name), scratch)
    }

    /// Adds modules under names that keep their order.
    pub(super) fn add_modules(&mut self, modules: Vec<Module>) {
        for (number, Module { name, data }) in modules.into_iter().enumerate() {
            self.add(format!("modules/{number:03}-{name}.ko"), data);
        }
    }

    fn insert(&mut self, path: &Path, data: Vec<u8>, is_program: bool) {
        self.files.insert(path.to_owned(), Content { data, is_program });
    }

    /// Writes the archive, in the format that the kernel takes.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        self.archive(BufWriter::new(file)).with_context(|| format!("cannot write {}", path.display()))
    }

    fn archive(&self, mut out: impl Write) -> Result<()> {
        let ancestors = self.files.keys().flat_map(|path| path.ancestors().skip(1));
        // Sorted, so that each comes after the one that it lies in.
        let directories: BTreeSet<&Path> = ancestors.filter(|path| !path.as_os_str().is_empty()).collect();
        for directory in directories {
            out = append(out, directory, ModeFileType::Directory, 0o755, &[])?;
        }
        for (path, Content { data, is_program }) in &self.files {
            let mode = if *is_program { 0o755 } else { 0o644 };
            out = append(out, path, ModeFileType::Regular, mode, data)?;
        }
        Ok(newc::trailer(out)?.flush()?)
    }
}

fn append<W: Write>(out: W, path: &Path, kind: ModeFileType, mode: u32, data: &[u8]) -> Result<W> {
    let name = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    let entry = newc::Builder::new(name).nlink(1).mode(mode).set_mode_file_type(kind);
    let mut writer = entry.write(out, u32::try_from(data.len())?);
    writer.write_all(data)?;
    Ok(writer.finish()?)
}

/// The paths in what `ldd` prints: `libc.so.6 => /lib/…/libc.so.6 (0x…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn libraries(ldd: &str) -> impl Iterator<Item = &str> {
    ldd.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_ldd_prints() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f3c)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f3d)\n";
        let found: Vec<&str> = libraries(text).collect();
        assert_eq!(found, ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        assert_eq!(libraries("\tstatically linked\n").count(), 0);
    }

    #[test]
    fn directories_come_before_what_is_in_them() {
        let mut image = Image::default();
        image.add("a/b/file", b"text".to_vec());
        image.add("init", Vec::new());
        let mut archive = Vec::new();
        image.archive(&mut archive).unwrap();
        let mut names = Vec::new();
        let mut rest = archive.as_slice();
        loop {
            let reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            names.push(reader.entry().name().to_owned());
            rest = reader.finish().unwrap();
        }
        assert_eq!(names, ["a", "a/b", "a/b/file", "init"]);
    }
}
