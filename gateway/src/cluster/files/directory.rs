//! What a directory of manifests says, and what changed since it was last looked at.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use super::manifest::Manifest;
use crate::cluster::{
    model::{Event, Object, ObjectRef},
    problem::{Problem, ProblemList},
};

/// Larger files are refused: a cluster of 5,000 nodes fits several times, a stray disk image does not.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// A file that never falls quiet is read nevertheless.
const PATIENCE: Duration = Duration::from_millis(500);

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
    /// What it holds; the objects themselves are kept with those of all files.
    objects: BTreeSet<ObjectRef>,
    problems: Vec<Problem>,
    ignored: usize,
    /// It has been read to the end and understood, now or earlier: what it does not hold does not exist.
    understood: bool,
    /// It is being written since then.
    unsettled: Option<Instant>,
}

/// The files that hold an object, first by name first, and what each of them says.
type Holders = Vec<(Arc<str>, Arc<Object>)>;

/// What a look at the directory brought.
#[derive(Debug, Default)]
pub struct Look {
    /// What changed in the objects.
    pub events: Vec<Event>,
    /// A file is being written: look again soon.
    pub unsettled: bool,
    /// Some file has never been understood as a whole: what is in it may exist as well.
    pub partial: bool,
}

/// A directory of manifests, as it was when last looked at.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    problems: ProblemList,
    quiet: Duration,
    files: BTreeMap<Arc<str>, FileState>,
    objects: HashMap<ObjectRef, Holders>,
    /// Objects that several files hold.
    contested: BTreeSet<ObjectRef>,
}

impl Directory {
    /// A directory that has not been looked at. What is wrong with it is kept in `problems`. A file is read when
    /// nobody has written to it for `quiet`.
    pub fn new(path: &Path, problems: ProblemList, quiet: Duration) -> Self {
        Self {
            path: path.to_owned(),
            problems,
            quiet,
            files: BTreeMap::new(),
            objects: HashMap::new(),
            contested: BTreeSet::new(),
        }
    }

    /// Looks at the directory, and reads the files that changed. If the directory itself cannot be read, nothing
    /// changes: `None`, and the error is among the problems.
    pub fn rescan(&mut self) -> Option<Look> {
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

        // What was in force before this look, for everything that it touches.
        let mut before = BTreeMap::new();
        let gone: Vec<Arc<str>> =
            self.files.keys().filter(|name| !names.contains(name.as_ref())).cloned().collect();
        for name in gone {
            let state = self.files.remove(&name).unwrap_or_default();
            self.replace(&name, &state.objects, BTreeMap::new(), &mut before);
            self.problems.set(&self.place(&name), Vec::new());
        }
        let mut unsettled = false;
        for name in names {
            let name =
                self.files.get_key_value(name.as_str()).map_or_else(|| name.into(), |(name, _)| name.clone());
            unsettled |= self.refresh(&name, &mut before);
        }
        self.report_contested(&place);
        let partial = self.files.values().any(|file| !file.understood);
        Some(Look { events: self.events(before), unsettled, partial })
    }

    /// How many objects of other kinds the files hold.
    pub fn ignored(&self) -> usize {
        self.files.values().map(|state| state.ignored).sum()
    }

    fn place(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }

    /// Reads a file if it changed. Tells whether it is being written, and so was left alone for now.
    fn refresh(&mut self, name: &Arc<str>, before: &mut Before) -> bool {
        let mut state = self.files.remove(name).unwrap_or_default();
        let found = read(&self.path.join(name.as_ref()), state.stamp, self.quiet, &mut state.unsettled);
        let unsettled = match found {
            Ok(Found::Same) => false,
            Ok(Found::Unsettled) => true,
            Ok(Found::New(stamp, text)) => {
                self.take(name, &mut state, &text, before);
                state.stamp = Some(stamp);
                false
            }
            Err(error) => {
                let problem = Problem::error(
                    name.as_ref(),
                    format!("cannot be read: {error}"),
                    "mend it or remove it; until then what it said before stays in force",
                );
                state.stamp = None;
                if state.problems != [problem.clone()] {
                    state.problems = vec![problem];
                    self.problems.set(&self.place(name), state.problems.clone());
                }
                false
            }
        };
        self.files.insert(name.clone(), state);
        unsettled
    }

    /// Takes over what a file says.
    fn take(&mut self, name: &Arc<str>, state: &mut FileState, text: &[u8], before: &mut Before) {
        let manifest = if Path::new(name.as_ref()).extension() == Some(OsStr::new("json")) {
            Manifest::from_json(name, text)
        } else {
            Manifest::from_yaml(name, text)
        };
        let Manifest { objects, broken, problems, complete, ignored, .. } = manifest;
        let held: BTreeSet<ObjectRef> = objects.keys().cloned().collect();
        // What is broken, or cut off, goes on as it was.
        let (kept, dropped): (BTreeSet<ObjectRef>, BTreeSet<ObjectRef>) = std::mem::take(&mut state.objects)
            .into_iter()
            .filter(|known| !held.contains(known))
            .partition(|known| !complete || broken.contains(known));
        self.replace(name, &dropped, objects, before);
        state.objects = held;
        state.objects.extend(kept);
        if state.problems != problems {
            self.problems.set(&self.place(name), problems.clone());
            state.problems = problems;
        }
        state.ignored = ignored;
        state.understood |= complete && broken.is_empty();
    }

    /// Removes `dropped` from what a file holds, and puts `objects` there.
    fn replace(
        &mut self,
        name: &Arc<str>,
        dropped: &BTreeSet<ObjectRef>,
        objects: BTreeMap<ObjectRef, Arc<Object>>,
        before: &mut Before,
    ) {
        for reference in dropped {
            let Some(holders) = self.objects.get_mut(reference) else { continue };
            before.entry(reference.clone()).or_insert_with(|| in_force(holders));
            holders.retain(|(holder, _)| holder != name);
            if holders.len() < 2 {
                self.contested.remove(reference);
            }
            if holders.is_empty() {
                self.objects.remove(reference);
            }
        }
        for (reference, object) in objects {
            let holders = self.objects.entry(reference.clone()).or_insert_with(|| Vec::with_capacity(1));
            let previous = in_force(holders);
            match holders.binary_search_by(|(holder, _)| holder.cmp(name)) {
                Ok(at) if holders[at].1 == object => continue,
                Ok(at) => holders[at].1 = object,
                Err(at) => holders.insert(at, (name.clone(), object)),
            }
            if holders.len() > 1 {
                self.contested.insert(reference.clone());
            }
            before.entry(reference).or_insert(previous);
        }
    }

    fn report_contested(&self, place: &str) {
        let problems = self.contested.iter().flat_map(|reference| {
            let mut holders = self.objects.get(reference).into_iter().flatten().map(|(name, _)| name);
            let first = holders.next();
            holders.filter_map(move |name| {
                Some(Problem::error(
                    format!("{name}, {reference}"),
                    format!("is also in {}, which comes first by name and counts", first?),
                    "remove it from one of the two files",
                ))
            })
        });
        self.problems.set(&format!("{place}: several files"), problems.collect());
    }

    /// Events for the objects whose version in force is another one now.
    fn events(&self, before: Before) -> Vec<Event> {
        let (mut events, mut gone) = (Vec::new(), Vec::new());
        for (reference, before) in before {
            match self.objects.get(&reference).and_then(in_force) {
                Some(now) if before.as_ref() != Some(&now) => events.push(Event::Apply(now)),
                Some(_) => {}
                None => gone.extend(before.map(|_| Event::Delete(reference))),
            }
        }
        // What appears goes first: an object that moves from one name to another is never nowhere.
        events.append(&mut gone);
        events
    }
}

/// The version of objects that was in force; `None` for those that were not there.
type Before = BTreeMap<ObjectRef, Option<Arc<Object>>>;

fn in_force(holders: &Holders) -> Option<Arc<Object>> {
    holders.first().map(|(_, object)| object.clone())
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

/// What became of a file.
enum Found {
    /// It is still the one with the stamp.
    Same,
    /// It is being written.
    Unsettled,
    /// Another one.
    New(Stamp, Vec<u8>),
}

/// The content, unless the file is the `known` one or somebody has written to it within `quiet`. `unsettled` is when
/// that was seen first: a file that is written all the time is read nevertheless.
fn read(
    path: &Path,
    known: Option<Stamp>,
    quiet: Duration,
    unsettled: &mut Option<Instant>,
) -> io::Result<Found> {
    let metadata = fs::metadata(path)?;
    let irregular = || io::Error::other("it is not a regular file");
    if !metadata.is_file() {
        return Err(irregular());
    }
    if Some(Stamp::of(&metadata)) == known {
        return Ok(Found::Same);
    }
    let too_large = || io::Error::other(format!("it is larger than {} MiB", MAX_FILE_BYTES >> 20));
    if metadata.len() > MAX_FILE_BYTES {
        return Err(too_large());
    }
    // A time in the future is nobody's writing.
    let fresh = metadata.modified()?.elapsed().is_ok_and(|age| age < quiet);
    if fresh && unsettled.get_or_insert_with(Instant::now).elapsed() < PATIENCE {
        return Ok(Found::Unsettled);
    }
    *unsettled = None;
    // Its name may mean another file by now, even one whose opening would wait for somebody to write to it.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(irregular());
    }
    let stamp = Stamp::of(&metadata);
    let mut text = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(too_large());
    }
    Ok(Found::New(stamp, text))
}
