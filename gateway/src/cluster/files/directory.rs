//! What a directory of manifests says, and what changed since it was last looked at.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::manifest::Manifest;
use crate::cluster::{
    model::{Event, Object, ObjectRef},
    problem::{Problem, ProblemList},
};

/// Larger files are refused: a cluster of 5,000 nodes fits several times, a stray disk image does not.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Tells versions of a file apart without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

#[derive(Debug, Default)]
struct FileState {
    stamp: Option<Stamp>,
    objects: BTreeMap<ObjectRef, Arc<Object>>,
    problems: Vec<Problem>,
    ignored: usize,
}

/// A directory of manifests, as it was when last looked at.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    problems: ProblemList,
    /// By file name: the first one that names an object has it.
    files: BTreeMap<String, FileState>,
    /// What has been told.
    told: BTreeMap<ObjectRef, Arc<Object>>,
}

impl Directory {
    /// A directory that has not been looked at. What is wrong with it is kept in `problems`.
    pub fn new(path: &Path, problems: ProblemList) -> Self {
        Self { path: path.to_owned(), problems, files: BTreeMap::new(), told: BTreeMap::new() }
    }

    /// Looks at the directory, reads the files that changed, and returns what changed in the objects. If the
    /// directory itself cannot be read, nothing changes: `None`, and the error is among the problems.
    pub fn rescan(&mut self) -> Option<Vec<Event>> {
        let place = self.path.display().to_string();
        let names = match list(&self.path) {
            Ok(names) => names,
            Err(error) => {
                let problem = Problem::error(
                    place.as_str(),
                    format!("cannot be read: {error}"),
                    "create the directory, or set source.path; until then what it said before stays in force",
                );
                self.problems.set(&place, vec![problem]);
                return None;
            }
        };
        self.problems.set(&place, Vec::new());

        let gone: Vec<String> = self.files.keys().filter(|name| !names.contains(*name)).cloned().collect();
        let mut changed: BTreeSet<ObjectRef> = BTreeSet::new();
        for name in &gone {
            if let Some(state) = self.files.remove(name) {
                changed.extend(state.objects.into_keys());
            }
            self.problems.set(&self.place(name), Vec::new());
        }
        let mut any = !gone.is_empty();
        for name in names {
            let path = self.path.join(&name);
            let state = self.files.entry(name.clone()).or_default();
            any |= state.refresh(&name, &path, &mut changed);
        }
        if any {
            self.report();
        }
        Some(self.tell(changed))
    }

    /// Every object that is in force.
    pub fn objects(&self) -> impl Iterator<Item = &Arc<Object>> {
        self.told.values()
    }

    /// How many objects of other kinds the files hold.
    pub fn ignored(&self) -> usize {
        self.files.values().map(|state| state.ignored).sum()
    }

    fn place(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }

    /// Publishes the problems of every file, and those between files.
    fn report(&self) {
        let mut owners: BTreeMap<&ObjectRef, &str> = BTreeMap::new();
        for (name, state) in &self.files {
            let mut problems = state.problems.clone();
            for reference in state.objects.keys() {
                match owners.get(reference) {
                    Some(owner) => problems.push(Problem::error(
                        format!("{name}, {reference}"),
                        format!("is also in {owner}, which comes first by name and counts"),
                        "remove it from one of the two files",
                    )),
                    None => {
                        owners.insert(reference, name);
                    }
                }
            }
            self.problems.set(&self.place(name), problems);
        }
    }

    /// Events for the objects whose version in force changed.
    fn tell(&mut self, changed: BTreeSet<ObjectRef>) -> Vec<Event> {
        let mut events = Vec::new();
        for reference in changed {
            let now = self.files.values().find_map(|state| state.objects.get(&reference));
            match now {
                Some(now) => {
                    let before = self.told.insert(reference, now.clone());
                    if before.as_ref() != Some(now) {
                        events.push(Event::Apply(now.clone()));
                    }
                }
                None => {
                    if self.told.remove(&reference).is_some() {
                        events.push(Event::Delete(reference));
                    }
                }
            }
        }
        // What appears goes first: an object that moves from one name to another is never nowhere.
        events.sort_by_key(|event| matches!(event, Event::Delete(_)));
        events
    }
}

impl FileState {
    /// Reads the file if it changed; notes the objects that did. Returns whether anything was read.
    fn refresh(&mut self, name: &str, path: &Path, changed: &mut BTreeSet<ObjectRef>) -> bool {
        let (stamp, text) = match read(path, self.stamp) {
            Ok(None) => return false,
            Ok(Some(read)) => read,
            Err(error) => {
                let problem = Problem::error(
                    name,
                    format!("cannot be read: {error}"),
                    "mend it or remove it; until then what it said before stays in force",
                );
                let news = self.problems != [problem.clone()];
                self.stamp = None;
                self.problems = vec![problem];
                return news;
            }
        };
        let manifest = if Path::new(name).extension() == Some(OsStr::new("json")) {
            Manifest::from_json(name, &text)
        } else {
            Manifest::from_yaml(name, &text)
        };
        let mut before = std::mem::replace(&mut self.objects, manifest.objects);
        if manifest.complete {
            before.retain(|reference, _| {
                changed.insert(reference.clone());
                manifest.broken.contains(reference)
            });
        }
        for (reference, object) in before {
            self.objects.entry(reference).or_insert(object);
        }
        changed.extend(self.objects.keys().cloned());
        self.stamp = Some(stamp);
        self.problems = manifest.problems;
        self.ignored = manifest.ignored;
        true
    }
}

/// Names of the manifests in a directory.
fn list(path: &Path) -> io::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let extension = Path::new(&name).extension().and_then(OsStr::to_str);
        if name.starts_with('.') || !matches!(extension, Some("yaml" | "yml" | "json")) {
            continue;
        }
        // A dangling link counts as a file that cannot be read; a directory does not count.
        if !fs::metadata(entry.path()).is_ok_and(|metadata| metadata.is_dir()) {
            names.insert(name);
        }
    }
    Ok(names)
}

/// The content, unless the file is still the one with stamp `known`.
fn read(path: &Path, known: Option<Stamp>) -> io::Result<Option<(Stamp, Vec<u8>)>> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    if Some(Stamp::of(&metadata)) == known {
        return Ok(None);
    }
    let file = File::open(path)?;
    // Of the open file: its name may mean another one by now, and the next look will see that.
    let stamp = Stamp::of(&file.metadata()?);
    let mut text = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::other(format!("it is larger than {} MiB", MAX_FILE_BYTES >> 20)));
    }
    Ok(Some((stamp, text)))
}
