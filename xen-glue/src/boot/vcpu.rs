//! The state in which vCPU 0 begins: as the PVH boot protocol wants it, loaded as an HVM context.
//!
//! Xen's context is a sequence of records {u16 type, u16 instance, u32 length} and their bodies, ended by type 0. It may be loaded in
//! part, but only with the HEADER of the Xen that loads it. Each load takes all vCPUs down and starts those whose CPU record it has:
//! so MTRRs and CPU go in one.
//!
//! Sources: `docs/misc/pvh.pandoc`; `xen/include/public/arch-x86/hvm/save.h` and `hvm/save.h`; what libxc sets is in
//! `tools/libs/guest/xg_dom_x86.c`, `vcpu_hvm`.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

const END: u16 = 0;
const HEADER: u16 = 1;
const CPU: u16 = 2;
const LAPIC_REGS: u16 = 6;
const MTRR: u16 = 14;

/// In an MTRR record: msr_pat_cr, 8 pairs, 11 fixed, msr_mtrr_cap, then msr_mtrr_def_type.
const MTRR_DEF_TYPE_AT: usize = 8 * (1 + 16 + 11 + 1);
const MTRR_BYTES: usize = MTRR_DEF_TYPE_AT + 8;
/// MTRRs are on, and memory no other MTRR speaks of is write-back.
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;
/// The local APIC's ID register; the ID is its upper byte.
const APIC_ID_AT: usize = 0x20;

/// Protected mode; the bit that is always set.
const CR0_PE_ET: u64 = 1 | 1 << 4;
/// The bit that is always set; interrupts off.
const RFLAGS: u64 = 1 << 1;
const DR6: u64 = 0xffff_0ff0;
const DR7: u64 = 0x400;
/// Present, ring 0, 32 bits, in pages: readable code, accessed.
const CODE: u32 = 0xc9b;
/// The same: writable data, accessed.
const DATA: u32 = 0xc93;
/// A busy 32-bit TSS, and its size less one.
const TSS: u32 = 0x8b;
const TSS_LIMIT: u32 = 0x67;

/// struct hvm_save_descriptor.
#[derive(IntoBytes, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Descriptor {
    typecode: U16,
    instance: U16,
    length: U32,
}

/// Segment registers in the order in which struct hvm_hw_cpu has each of their parts.
#[derive(IntoBytes, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Segments<T> {
    cs: T,
    ds: T,
    es: T,
    fs: T,
    gs: T,
    ss: T,
    tr: T,
    ldtr: T,
}

/// struct hvm_hw_cpu. `flags` came with Xen 4.7; zero there says that the FPU is as after a reset.
#[derive(IntoBytes, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Cpu {
    fpu_regs: [u8; 512],
    rax: U64,
    rbx: U64,
    /// rcx, rdx, rbp, rsi, rdi, rsp, r8 to r15.
    others: [U64; 14],
    rip: U64,
    rflags: U64,
    cr0: U64,
    cr2: U64,
    cr3: U64,
    cr4: U64,
    dr0_to_dr3: [U64; 4],
    dr6: U64,
    dr7: U64,
    selectors: Segments<U32>,
    limits: Segments<U32>,
    idtr_limit: U32,
    gdtr_limit: U32,
    bases: Segments<U64>,
    idtr_base: U64,
    gdtr_base: U64,
    arbytes: Segments<U32>,
    sysenter: [U64; 3],
    shadow_gs: U64,
    /// flags, lstar, star, cstar, syscall_mask, efer, tsc_aux.
    msrs: [U64; 7],
    tsc: U64,
    pending_event: U32,
    error_code: U32,
    flags: U32,
    pad: U32,
}

const _: () = assert!(size_of::<Descriptor>() == 8);
const _: () = assert!(size_of::<Cpu>() == 1032, "as Xen 4.7 to 4.22 write it");
const _: () =
    assert!(offset_of!(Cpu, rip) == 640 && offset_of!(Cpu, cr0) == 656 && offset_of!(Cpu, dr6) == 720);
const _: () = assert!(offset_of!(Cpu, selectors) == 736 && offset_of!(Cpu, limits) == 768);
const _: () = assert!(offset_of!(Cpu, bases) == 808 && offset_of!(Cpu, arbytes) == 888);
const _: () =
    assert!(offset_of!(Cpu, msrs) == 952 && offset_of!(Cpu, tsc) == 1008 && offset_of!(Cpu, flags) == 1024);

/// What is wrong with the context a domain has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ContextError {
    /// A record goes on behind its end.
    #[error("record {0} of the domain's HVM context is cut off")]
    CutOff(usize),
    /// One that every Xen writes is not there.
    #[error("the domain's HVM context has no {0} record")]
    Missing(&'static str),
    /// An MTRR record of another size than that of all known versions.
    #[error("the MTRR record of vCPU {vcpu} has {length} bytes instead of {MTRR_BYTES}")]
    Mtrr {
        /// Whose.
        vcpu: u16,
        /// In bytes.
        length: usize,
    },
    /// The ACPI tables name other processors than there are.
    #[error("vCPU {vcpu} has the APIC id {id}, the ACPI tables say {told}")]
    ApicId {
        /// Whose.
        vcpu: u16,
        /// What Xen gave it.
        id: u8,
        /// What the guest is told.
        told: u8,
    },
}

/// What to load into a newborn domain, whose own context is `own`, so that its first vCPU begins at `entry` with `start_info`
/// in ebx.
///
/// `apic_id` says which APIC id the guest has been told a vCPU has.
pub fn context(
    own: &[u8],
    entry: u32,
    start_info: u32,
    apic_id: impl Fn(u16) -> Option<u8>,
) -> Result<Vec<u8>, ContextError> {
    let records = Record::all(own)?;
    let header = records.iter().find(|record| record.typecode == HEADER);
    let mut out = Vec::new();
    push(&mut out, HEADER, 0, header.ok_or(ContextError::Missing("HEADER"))?.body);
    check_apic_ids(&records, apic_id)?;
    for record in records.iter().filter(|record| record.typecode == MTRR) {
        push(&mut out, MTRR, record.instance, &write_back(record)?);
    }
    if !records.iter().any(|record| record.typecode == MTRR) {
        return Err(ContextError::Missing("MTRR"));
    }
    push(&mut out, CPU, 0, Cpu::at_entry(entry, start_info).as_bytes());
    push(&mut out, END, 0, &[]);
    Ok(out)
}

impl Cpu {
    /// Flat 32-bit protected mode without paging.
    fn at_entry(entry: u32, start_info: u32) -> Cpu {
        let mut cpu = Cpu::new_zeroed();
        cpu.rip.set(u64::from(entry));
        cpu.rbx.set(u64::from(start_info));
        cpu.rflags.set(RFLAGS);
        cpu.cr0.set(CR0_PE_ET);
        cpu.dr6.set(DR6);
        cpu.dr7.set(DR7);
        let Segments { cs, ds, es, ss, tr, .. } = &mut cpu.limits;
        [cs, ds, es, ss].into_iter().for_each(|limit| limit.set(u32::MAX));
        tr.set(TSS_LIMIT);
        let Segments { cs, ds, es, ss, tr, .. } = &mut cpu.arbytes;
        cs.set(CODE);
        [ds, es, ss].into_iter().for_each(|arbytes| arbytes.set(DATA));
        tr.set(TSS);
        cpu
    }
}

/// A vCPU's MTRRs, on, with memory write-back by default: nobody else sets them up, as there is no firmware.
fn write_back(record: &Record) -> Result<[u8; MTRR_BYTES], ContextError> {
    let size = ContextError::Mtrr { vcpu: record.instance, length: record.body.len() };
    let mut mtrrs: [u8; MTRR_BYTES] = record.body.try_into().map_err(|_| size)?;
    mtrrs[MTRR_DEF_TYPE_AT..].copy_from_slice(&MTRR_ON_WRITE_BACK.to_le_bytes());
    Ok(mtrrs)
}

/// A guest finds its vCPUs by the ids the tables name; a later Xen may give others.
fn check_apic_ids(records: &[Record], apic_id: impl Fn(u16) -> Option<u8>) -> Result<(), ContextError> {
    for record in records.iter().filter(|record| record.typecode == LAPIC_REGS) {
        let (vcpu, id) = (record.instance, record.body.get(APIC_ID_AT + 3));
        if let (Some(&id), Some(told)) = (id, apic_id(vcpu)) {
            if id != told {
                return Err(ContextError::ApicId { vcpu, id, told });
            }
        }
    }
    Ok(())
}

struct Record<'a> {
    typecode: u16,
    instance: u16,
    body: &'a [u8],
}

impl Record<'_> {
    /// The records of a context, without its END.
    fn all(mut context: &[u8]) -> Result<Vec<Record<'_>>, ContextError> {
        let mut records = Vec::new();
        loop {
            let cut_off = ContextError::CutOff(records.len());
            let (descriptor, rest) = Descriptor::ref_from_prefix(context).map_err(|_| cut_off)?;
            if descriptor.typecode.get() == END {
                return Ok(records);
            }
            let length = usize::try_from(descriptor.length.get()).map_err(|_| cut_off)?;
            let (body, rest) = rest.split_at_checked(length).ok_or(cut_off)?;
            records.push(Record {
                typecode: descriptor.typecode.get(),
                instance: descriptor.instance.get(),
                body,
            });
            context = rest;
        }
    }
}

fn push(context: &mut Vec<u8>, typecode: u16, instance: u16, body: &[u8]) {
    let (typecode, instance, length) = (U16::new(typecode), U16::new(instance), U32::new(body.len() as u32));
    context.extend(Descriptor { typecode, instance, length }.as_bytes());
    context.extend(body);
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The context of a newborn domain with so many vCPUs, without what this module does not look at.
    pub fn newborn(vcpus: u16) -> Vec<u8> {
        let mut context = Vec::new();
        push(&mut context, HEADER, 0, &[0xaa; 24]);
        for vcpu in 0..vcpus {
            let mut registers = [0; 1024];
            registers[APIC_ID_AT + 3] = vcpu as u8 * 2;
            push(&mut context, LAPIC_REGS, vcpu, &registers);
        }
        for vcpu in 0..vcpus {
            push(&mut context, MTRR, vcpu, &[0x11; MTRR_BYTES]);
        }
        push(&mut context, END, 0, &[]);
        context
    }

    fn doubled(vcpu: u16) -> Option<u8> {
        Some(vcpu as u8 * 2)
    }

    #[test]
    fn vcpu_0_begins_as_the_boot_protocol_says() {
        let context = context(&newborn(2), 0x100_0850, 0x3e0_0000, doubled).unwrap();
        let records = Record::all(&context).unwrap();
        let kinds: Vec<_> = records.iter().map(|record| (record.typecode, record.instance)).collect();
        assert_eq!(kinds, [(HEADER, 0), (MTRR, 0), (MTRR, 1), (CPU, 0)]);
        assert_eq!(records[0].body, [0xaa; 24]);
        assert_eq!(records[2].body[MTRR_DEF_TYPE_AT - 1..], [0x11, 6, 8, 0, 0, 0, 0, 0, 0]);
        let (cpu, _) = Cpu::ref_from_prefix(records[3].body).unwrap();
        assert_eq!(
            (cpu.rip.get(), cpu.rbx.get(), cpu.cr0.get(), cpu.cr4.get()),
            (0x100_0850, 0x3e0_0000, 0x11, 0)
        );
        assert_eq!((cpu.arbytes.cs.get(), cpu.limits.cs.get(), cpu.limits.tr.get()), (0xc9b, u32::MAX, 0x67));
    }

    #[test]
    fn a_context_that_is_no_newborn_s_is_refused() {
        let own = newborn(2);
        let refused = |own: &[u8]| context(own, 0, 0, doubled).unwrap_err();
        assert_eq!(refused(&own[..own.len() - 1]), ContextError::CutOff(5));
        assert_eq!(refused(&newborn(0)), ContextError::Missing("MTRR"));
        assert_eq!(refused(&[0; 8]), ContextError::Missing("HEADER"));
        let told = context(&own, 0, 0, |vcpu| Some(vcpu as u8)).unwrap_err();
        assert_eq!(told, ContextError::ApicId { vcpu: 1, id: 2, told: 1 });
    }
}
