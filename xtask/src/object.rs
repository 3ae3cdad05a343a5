//! Reads the BPF object without loading it: what may not be in it, and how deep its stack goes.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use object::{
    Architecture, Object, ObjectSection, ObjectSymbol, RelocationTarget, SectionIndex, SectionKind,
    SymbolKind,
    elf::R_BPF_64_32,
    read::{File, RelocationFlags},
};

/// Stack of a chain of calls, bytes: the kernel's `MAX_BPF_STACK`.
pub(crate) const STACK_LIMIT: u32 = 512;
/// `BPF_OBJ_NAME_LEN` without its terminator; the kernel cuts the rest.
const NAME_LIMIT: usize = 15;
/// The verifier counts a frame in steps of this many bytes.
const FRAME_STEP: u32 = 32;
/// What LLVM calls when it does not expand a copy or a comparison in place: a loop over bytes.
const MEMORY_FUNCTIONS: [&str; 5] = ["bcmp", "memcmp", "memcpy", "memmove", "memset"];

/// What the scan found.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// Programs, by name.
    pub(crate) programs: Vec<Program>,
    /// Calls to functions that copy or compare byte by byte.
    pub(crate) byte_loops: Vec<String>,
    /// Reasons to refuse the object.
    pub(crate) faults: Vec<String>,
}

/// An entry point.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) name: String,
    /// Instructions of the program and of all it calls, 8 bytes each.
    pub(crate) instructions: usize,
    /// Deepest stack over all chains of calls, bytes.
    pub(crate) stack: u32,
}

/// Number of the section, and offset of the first instruction in it.
type Place = (usize, u64);

struct Function {
    name: String,
    instructions: usize,
    stack: u32,
    calls: BTreeSet<Place>,
    loops_for_ever: bool,
}

/// Looks through the object.
///
/// # Errors
/// When the bytes are no BPF object, or calls lead to nowhere.
pub(crate) fn scan(bytes: &[u8]) -> Result<Report> {
    let file = File::parse(bytes).context("not an ELF object")?;
    ensure!(file.architecture() == Architecture::Bpf, "an object for {:?}, not for BPF", file.architecture());
    let mut report = Report::default();

    if file.section_by_name(".BTF").is_none() {
        report.faults.push("no BTF: map dumps would show bytes instead of named fields".to_owned());
    }
    for symbol in file.symbols() {
        let name = symbol.name().context("symbol with an unreadable name")?;
        if name.contains("panic") || name.contains("rust_begin_unwind") {
            report.faults.push(format!("a panic can be reached: symbol {name}"));
        }
        let section = symbol.section_index().map(|index| file.section_by_index(index)).transpose()?;
        let section_name = section.as_ref().map(ObjectSection::name).transpose()?.unwrap_or_default();
        let is_map = matches!(section_name, "maps" | ".maps") && symbol.kind() == SymbolKind::Data;
        if (is_map || is_program(section_name, symbol.kind())) && name.len() > NAME_LIMIT {
            report
                .faults
                .push(format!("name {name} has {} characters, the kernel keeps {NAME_LIMIT}", name.len()));
        }
    }

    let functions = functions(&file, &mut report.faults)?;
    for (place, function) in &functions {
        let section = file.section_by_index(SectionIndex(place.0))?;
        if !is_program(section.name()?, SymbolKind::Text) {
            continue;
        }
        let mut reached = BTreeSet::new();
        let stack = deepest(&functions, *place, &mut Vec::new(), &mut reached)?;
        let mut instructions = 0;
        for callee in reached.iter().filter_map(|place| functions.get(place)) {
            instructions += callee.instructions;
            if MEMORY_FUNCTIONS.contains(&callee.name.as_str()) {
                report
                    .byte_loops
                    .push(format!("{} calls {}, which works byte by byte", function.name, callee.name));
            }
            if callee.loops_for_ever {
                report.faults.push(format!("{} loops for ever, as a panic handler does", callee.name));
            }
        }
        if stack > STACK_LIMIT {
            report.faults.push(format!(
                "{} needs {stack} bytes of stack, the kernel has {STACK_LIMIT}",
                function.name
            ));
        }
        report.programs.push(Program { name: function.name.clone(), instructions, stack });
    }
    if report.programs.is_empty() {
        report.faults.push("no program in it".to_owned());
    }
    report.byte_loops.sort();
    report.byte_loops.dedup();
    report.faults.sort();
    report.faults.dedup();
    Ok(report)
}

/// `.text` and its parts hold what programs call; entry points have sections named after their type.
fn is_program(section: &str, kind: SymbolKind) -> bool {
    kind == SymbolKind::Text && section != ".text" && !section.starts_with(".text.")
}

fn functions(file: &File<'_>, faults: &mut Vec<String>) -> Result<BTreeMap<Place, Function>> {
    let mut functions = BTreeMap::new();
    for section in file.sections().filter(|section| section.kind() == SectionKind::Text) {
        let relocations = relocations(file, &section, faults)?;
        let code = section.data()?;
        for symbol in file.symbols() {
            if symbol.kind() != SymbolKind::Text || symbol.section_index() != Some(section.index()) {
                continue;
            }
            let name = symbol.name()?.to_owned();
            let range =
                usize::try_from(symbol.address())?..usize::try_from(symbol.address() + symbol.size())?;
            let body = code.get(range).with_context(|| format!("{name} is longer than its section"))?;
            let function = decode(name, body, section.index().0, symbol.address(), &relocations);
            functions.insert((section.index().0, symbol.address()), function);
        }
    }
    Ok(functions)
}

/// A call or a function's address in code: where the symbol is that the instruction's immediate is relative to.
struct Relocation {
    base: Place,
    is_call: bool,
}

fn relocations<'a>(
    file: &File<'a>,
    section: &impl ObjectSection<'a>,
    faults: &mut Vec<String>,
) -> Result<BTreeMap<u64, Relocation>> {
    let mut found = BTreeMap::new();
    for (offset, relocation) in section.relocations() {
        let RelocationTarget::Symbol(index) = relocation.target() else { continue };
        let symbol = file.symbol_by_index(index)?;
        let Some(target) = symbol.section_index() else {
            faults.push(format!("{} is used but defined nowhere", symbol.name()?));
            continue;
        };
        let is_call = matches!(relocation.flags(), RelocationFlags::Elf { r_type } if r_type == R_BPF_64_32);
        if file.section_by_index(target)?.kind() == SectionKind::Text {
            found.insert(offset, Relocation { base: (target.0, symbol.address()), is_call });
        }
    }
    Ok(found)
}

/// Reads the instructions (RFC 9669): calls, and accesses to the stack relative to r10.
fn decode(
    name: String,
    body: &[u8],
    section: usize,
    start: u64,
    relocations: &BTreeMap<u64, Relocation>,
) -> Function {
    const STACK_POINTER: u8 = 10;
    const LOAD_WIDE: u8 = 0x18;
    const CALL: u8 = 0x85;
    const JUMP: u8 = 0x05;
    const MOVE: u8 = 0xbf;
    const ADD_IMMEDIATE: u8 = 0x07;
    const CALL_IN_PROGRAM: u8 = 1;

    let mut function =
        Function { name, instructions: 0, stack: 0, calls: BTreeSet::new(), loops_for_ever: false };
    // What each register holds relative to r10, if the code before says so.
    let mut relative: [Option<i32>; 16] = [None; 16];
    relative[usize::from(STACK_POINTER)] = Some(0);
    let mut position = start;
    let mut second_half = false;
    for word in body.chunks_exact(8) {
        let &[code, registers, o0, o1, i0, i1, i2, i3] = word else { continue };
        function.instructions += 1;
        let here = position;
        position += 8;
        if std::mem::take(&mut second_half) {
            continue;
        }
        let (target, source) = (registers & 0x0f, registers >> 4);
        let offset = i16::from_le_bytes([o0, o1]);
        let immediate = i32::from_le_bytes([i0, i1, i2, i3]);
        let mut touch = |at: i32| function.stack = function.stack.max(at.min(0).unsigned_abs());

        match (code, code & 0x07) {
            (CALL, _) => {
                let relocation = relocations.get(&here).filter(|relocation| relocation.is_call);
                if let Some(Relocation { base, .. }) = relocation {
                    function
                        .calls
                        .insert((base.0, base.1.wrapping_add_signed((i64::from(immediate) + 1) * 8)));
                } else if source == CALL_IN_PROGRAM {
                    function.calls.insert((section, position.wrapping_add_signed(i64::from(immediate) * 8)));
                }
                relative[..6].fill(None);
            }
            (LOAD_WIDE, _) => {
                second_half = true;
                relative[usize::from(target)] = None;
                // The address of a function: a callback of bpf_loop and its kin.
                if let Some(Relocation { base, .. }) = relocations.get(&here) {
                    function.calls.insert((base.0, base.1.wrapping_add_signed(i64::from(immediate))));
                }
            }
            (JUMP, _) => function.loops_for_ever |= offset == -1,
            (MOVE, _) if offset == 0 => {
                relative[usize::from(target)] = relative[usize::from(source)];
                relative[usize::from(target)].into_iter().for_each(&mut touch);
            }
            (ADD_IMMEDIATE, _) => {
                let moved = relative[usize::from(target)].map(|at| at.saturating_add(immediate));
                moved.into_iter().for_each(&mut touch);
                relative[usize::from(target)] = moved;
            }
            // Load to a register.
            (_, 1) => {
                relative[usize::from(source)]
                    .map(|at| at + i32::from(offset))
                    .into_iter()
                    .for_each(&mut touch);
                relative[usize::from(target)] = None;
            }
            // Store to memory.
            (_, 2 | 3) => {
                relative[usize::from(target)]
                    .map(|at| at + i32::from(offset))
                    .into_iter()
                    .for_each(&mut touch);
            }
            // Arithmetic.
            (_, 4 | 7) => relative[usize::from(target)] = None,
            _ => {}
        }
        relative[usize::from(STACK_POINTER)] = Some(0);
    }
    function
}

/// The deepest stack below and with the function at `place`; collects what is reached.
fn deepest(
    functions: &BTreeMap<Place, Function>,
    place: Place,
    chain: &mut Vec<Place>,
    reached: &mut BTreeSet<Place>,
) -> Result<u32> {
    let function = functions.get(&place).with_context(|| {
        format!("a call leads to offset {:#x} of a section, where no function starts", place.1)
    })?;
    ensure!(!chain.contains(&place), "{} calls itself", function.name);
    reached.insert(place);
    chain.push(place);
    let mut below = 0;
    for callee in &function.calls {
        below = below.max(deepest(functions, *callee, chain, reached)?);
    }
    chain.pop();
    Ok(below + function.stack.max(1).next_multiple_of(FRAME_STEP))
}

#[cfg(test)]
mod tests {
    use object::{
        BinaryFormat, Endianness, SymbolFlags, SymbolScope,
        elf::R_BPF_64_64,
        write::{self, StandardSection, Symbol, SymbolSection},
    };

    use super::*;

    const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];
    /// `goto -1`
    const FOREVER: [u8; 8] = [0x05, 0, 0xff, 0xff, 0, 0, 0, 0];
    /// A call to wherever its relocation says.
    const CALL: [u8; 8] = [0x85, 0x10, 0, 0, 0xff, 0xff, 0xff, 0xff];
    /// The first half of `r2 = address`, for `bpf_loop`, of wherever its relocation says.
    const ADDRESS: [u8; 8] = [0x18, 0x02, 0, 0, 0, 0, 0, 0];
    const SECOND_HALF: [u8; 8] = [0; 8];

    /// `*(u64 *)(r10 + at) = r1`
    fn store(at: i16) -> [u8; 8] {
        let [low, high] = at.to_le_bytes();
        [0x7b, 0x1a, low, high, 0, 0, 0, 0]
    }

    /// An object with one program and one function in `.text`; the program calls it if its code has a call.
    fn object(program: (&str, &[[u8; 8]]), callee: (&str, &[[u8; 8]])) -> Vec<u8> {
        let mut file = write::Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
        file.add_section(Vec::new(), b".BTF".to_vec(), SectionKind::Other);
        let text = file.section_id(StandardSection::Text);
        let entry = file.add_section(Vec::new(), b"xdp".to_vec(), SectionKind::Text);
        let mut add = |section, (name, code): (&str, &[[u8; 8]])| {
            let symbol = file.add_symbol(Symbol {
                name: name.as_bytes().to_vec(),
                value: 0,
                size: 0,
                kind: SymbolKind::Text,
                scope: SymbolScope::Linkage,
                weak: false,
                section: SymbolSection::Undefined,
                flags: SymbolFlags::None,
            });
            file.add_symbol_data(symbol, section, code.as_flattened(), 8);
            symbol
        };
        let callee = add(text, callee);
        add(entry, program);
        for (at, word) in program.1.iter().enumerate() {
            let r_type = match *word {
                CALL => R_BPF_64_32,
                ADDRESS => R_BPF_64_64,
                _ => continue,
            };
            let flags = RelocationFlags::Elf { r_type };
            let relocation = write::Relocation { offset: at as u64 * 8, symbol: callee, addend: 0, flags };
            file.add_relocation(entry, relocation).unwrap();
        }
        file.write().unwrap()
    }

    fn faults(program: (&str, &[[u8; 8]]), callee: (&str, &[[u8; 8]])) -> Vec<String> {
        scan(&object(program, callee)).unwrap().faults
    }

    #[test]
    fn accepts_a_plain_object() {
        let report = scan(&object(("gateway", &[store(-8), CALL, EXIT]), ("helper", &[EXIT]))).unwrap();
        assert!(report.faults.is_empty(), "{:?}", report.faults);
        assert_eq!(report.programs.len(), 1);
        assert_eq!(report.programs[0].instructions, 4);
        assert_eq!(report.programs[0].stack, 64);
    }

    #[test]
    fn refuses_a_panic_symbol() {
        let found = faults(("gateway", &[EXIT]), ("_ZN4core9panicking18panic_bounds_check17h0E", &[EXIT]));
        assert!(found.iter().any(|fault| fault.contains("panic_bounds_check")), "{found:?}");
    }

    #[test]
    fn refuses_a_panic_handler_that_was_inlined() {
        let found = faults(("gateway", &[FOREVER, EXIT]), ("helper", &[EXIT]));
        assert!(found.iter().any(|fault| fault.contains("loops for ever")), "{found:?}");
    }

    #[test]
    fn finds_mem_functions_only_when_they_are_called() {
        for name in MEMORY_FUNCTIONS {
            let byte_loops = |program: &[[u8; 8]]| {
                scan(&object(("gateway", program), (name, &[EXIT]))).unwrap().byte_loops
            };
            assert!(byte_loops(&[EXIT]).is_empty());
            let found = byte_loops(&[CALL, EXIT]);
            assert!(found.len() == 1 && found[0].contains(name), "{found:?}");
        }
    }

    #[test]
    fn refuses_long_names() {
        assert!(faults(("fifteen_letters", &[EXIT]), ("a_function_may_have_any_name", &[EXIT])).is_empty());
        let found = faults(("sixteen_letters_", &[EXIT]), ("helper", &[EXIT]));
        assert!(found.iter().any(|fault| fault.contains("16 characters")), "{found:?}");
    }

    #[test]
    fn adds_the_stack_of_a_chain_of_calls() {
        assert!(faults(("gateway", &[store(-256), CALL, EXIT]), ("helper", &[store(-256), EXIT])).is_empty());
        let found = faults(("gateway", &[store(-256), CALL, EXIT]), ("helper", &[store(-264), EXIT]));
        assert!(found.iter().any(|fault| fault.contains("544 bytes of stack")), "{found:?}");
    }

    #[test]
    fn adds_the_stack_of_a_callback() {
        let program = [store(-256), ADDRESS, SECOND_HALF, EXIT];
        let report = scan(&object(("gateway", &program), ("callback", &[store(-256), EXIT]))).unwrap();
        assert!(report.faults.is_empty(), "{:?}", report.faults);
        assert_eq!((report.programs[0].stack, report.programs[0].instructions), (512, 6));
        let found = faults(("gateway", &program), ("callback", &[store(-264), EXIT]));
        assert!(found.iter().any(|fault| fault.contains("544 bytes of stack")), "{found:?}");
    }

    #[test]
    fn sees_stack_behind_a_copied_pointer() {
        // r2 = r10; r2 += -300
        let copied = [[0xbf, 0xa2, 0, 0, 0, 0, 0, 0], [0x07, 0x02, 0, 0, 0xd4, 0xfe, 0xff, 0xff], EXIT];
        let report = scan(&object(("gateway", &copied), ("helper", &[EXIT]))).unwrap();
        assert_eq!(report.programs[0].stack, 320);
    }

    #[test]
    fn refuses_what_is_no_bpf_object() {
        assert!(scan(b"hello").is_err());
        let host = write::Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
        assert!(scan(&host.write().unwrap()).unwrap_err().to_string().contains("X86_64"));
    }

    #[test]
    fn accepts_the_real_object() {
        let path = crate::process::workspace().join("target/bpf/gateway.bpf.o");
        let bytes = std::fs::read(&path).expect("built by `cargo xtask build`");
        let report = scan(&bytes).unwrap();
        assert!(report.faults.is_empty() && report.byte_loops.is_empty(), "{report:#?}");
        let names: Vec<&str> = report.programs.iter().map(|program| program.name.as_str()).collect();
        assert_eq!(names, ["gateway", "sweep"]);
        for program in &report.programs {
            assert!(program.instructions > 100 && program.stack >= FRAME_STEP, "{program:?}");
        }
    }
}
