//! Modules of a kernel, with those that they depend on.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use object::{File, Object, ObjectSection};

use crate::process::{capture_bytes, entries};

/// A module, as the kernel loads it.
pub(super) struct Module {
    pub(super) name: String,
    pub(super) data: Vec<u8>,
}

/// The named modules below a directory such as `/lib/modules/6.1.0` and those that they depend on, in the order in which
/// they can be loaded. What is built into this kernel is left out.
pub(super) fn collect(directory: &Path, names: &[&str]) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    list(directory, &mut files)?;
    let mut modules = Vec::new();
    for name in names {
        add(&mut modules, &files, name)?;
    }
    Ok(modules)
}

fn add(modules: &mut Vec<Module>, files: &BTreeMap<String, PathBuf>, name: &str) -> Result<()> {
    let Some(path) = files.get(name).filter(|_| modules.iter().all(|module| module.name != name)) else {
        return Ok(());
    };
    let data = if path.extension().is_some_and(|extension| extension == "xz") {
        capture_bytes(Command::new("xz").args(["--decompress", "--stdout"]).arg(path))?
    } else {
        fs::read(path).with_context(|| format!("cannot read {}", path.display()))?
    };
    for needed in dependencies(&data).with_context(|| format!("cannot make sense of {}", path.display()))? {
        add(modules, files, &needed)?;
    }
    modules.push(Module { name: name.to_owned(), data });
    Ok(())
}

/// What a module says that it needs.
fn dependencies(data: &[u8]) -> Result<Vec<String>> {
    let file = File::parse(data)?;
    let section = file.section_by_name(".modinfo").context("no section .modinfo")?;
    let text = String::from_utf8_lossy(section.data()?).into_owned();
    let names = text.split('\0').find_map(|entry| entry.strip_prefix("depends=")).unwrap_or_default();
    Ok(names.split(',').filter(|name| !name.is_empty()).map(underscored).collect())
}

fn list(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for path in entries(directory)? {
        if path.is_dir() && !path.is_symlink() {
            list(&path, files)?;
        } else if let Some(name) = name_of(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// The module's name if it is the path of one: `…/virtio-net.ko.xz` is `virtio_net`.
fn name_of(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let name = file.strip_suffix(".ko").or_else(|| file.strip_suffix(".ko.xz"))?;
    Some(underscored(name))
}

/// The kernel takes both for the same.
fn underscored(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use object::{Architecture, BinaryFormat, Endianness, SectionKind, write::Object as Writer};

    use super::*;

    fn module(depends: &str) -> Vec<u8> {
        let mut file = Writer::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
        let section = file.add_section(Vec::new(), b".modinfo".to_vec(), SectionKind::ReadOnlyString);
        file.append_section_data(section, format!("license=GPL\0depends={depends}\0").as_bytes(), 1);
        file.write().unwrap()
    }

    #[test]
    fn what_a_module_needs_comes_before_it() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("kernel/net");
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join("a-b.ko"), module("c,built-in")).unwrap();
        fs::write(place.join("c.ko"), module("d")).unwrap();
        fs::write(place.join("d.ko"), module("")).unwrap();
        let modules = collect(directory.path(), &["a_b", "d", "built_in"]).unwrap();
        let names: Vec<&str> = modules.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["d", "c", "a_b"]);
    }
}
