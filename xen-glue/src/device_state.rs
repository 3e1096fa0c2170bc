//! What of a captured PVH domain is neither memory nor volumes. In a savefile it is a device state of kind [`KIND`].
//!
//! The bytes are records framed as those of a libxc migration stream (u32 type, u32 length, body padded to 8 bytes,
//! little-endian; `docs/specs/libxc-migration-stream.pandoc`), with that stream's own types for what it has, and one of ours:
//! the [`Layout`]. So an exporter copies them, and an importer keeps them.
//!
//! Invariants:
//! - each record is there exactly once; END (type 0) is the last, and nothing comes after it;
//! - a record of a type we do not know is refused, unless bit 31 of its type says that it may be skipped. Ours has that bit,
//!   so that a libxc that finds it in a stream skips it; to us it is required;
//! - what is read is never larger than [`DEVICE_STATE_MAX`], and no count makes us allocate more than the bytes that are there.
//!
//! | type | body |
//! |---|---|
//! | 0x80000001 | u32 Xen major, u32 minor, u32 vCPUs, u32 count, then {u64 first frame, u64 frames} count times |
//! | 0x11 | CPUID leaves, 24 bytes each |
//! | 0x12 | MSRs, 16 bytes each |
//! | 0x08 | u32 TSC mode, u32 kHz, u64 ns, u32 incarnation, u32 zero |
//! | 0x0A | u32 count, u32 zero, then {u64 index, u64 value} count times |
//! | 0x09 | HVM context |
//! | 0x00 | empty |

use engine::savefile::DEVICE_STATE_MAX;
use engine::units::PageRange;

use crate::layout::Layout;

/// Its kind in a savefile.
pub const KIND: &str = "xen";
/// Its version.
pub const VERSION: u32 = 1;

/// The state of a PVH domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// Version of the Xen it was captured on: major, minor.
    pub xen: (u32, u32),
    /// How many vCPUs.
    pub vcpus: u32,
    /// Which frames the memory image holds.
    pub layout: Layout,
    /// XEN_DOMCTL_gettscinfo.
    pub tsc: TscInfo,
    /// XEN_DOMCTL_gethvmcontext, opaque.
    pub hvm_context: Vec<u8>,
    /// HVM parameters by index, those that are not zero and that a restore sets.
    pub hvm_params: Vec<(u64, u64)>,
    /// xen_cpuid_leaf_t entries, 24 bytes each; opaque.
    pub cpuid_policy: Vec<u8>,
    /// xen_msr_entry_t entries, 16 bytes each; opaque.
    pub msr_policy: Vec<u8>,
}

/// How the guest sees time-stamp counters: the body of a libxc X86_TSC_INFO record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TscInfo {
    /// XEN_CPUID_TSC_MODE_*.
    pub mode: u32,
    /// Frequency in kHz.
    pub khz: u32,
    /// Nanoseconds since the guest's creation.
    pub nsec: u64,
    /// How often it was moved.
    pub incarnation: u32,
}

/// Bytes of a xen_cpuid_leaf_t.
pub const CPUID_LEAF_BYTES: usize = 24;
/// Bytes of a xen_msr_entry_t.
pub const MSR_ENTRY_BYTES: usize = 16;
/// The most vCPUs an HVM or PVH guest has: HVM_MAX_VCPUS of `public/hvm/hvm_info_table.h`.
pub const VCPUS_MAX: u32 = 128;

const END: u32 = 0x00;
const TSC: u32 = 0x08;
const CONTEXT: u32 = 0x09;
const PARAMS: u32 = 0x0a;
const CPUID: u32 = 0x11;
const MSRS: u32 = 0x12;
const DOMAIN: u32 = 0x8000_0001;
/// A type with this bit may be skipped by who does not know it.
const OPTIONAL: u32 = 1 << 31;

/// Why bytes are no device state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceStateError {
    /// More than the engine stores.
    #[error("it has {0} bytes, at most {DEVICE_STATE_MAX} are allowed")]
    TooLarge(u64),
    /// The bytes end within a record, or without END.
    #[error("it ends early, at byte {0}")]
    Truncated(usize),
    /// Something follows END.
    #[error("{0} bytes follow its end")]
    Trailing(usize),
    /// A record we do not know and must not skip.
    #[error("record of unknown type {0:#x} at byte {1}")]
    Unknown(u32, usize),
    /// A record that is there twice.
    #[error("record {0:#x} is there twice")]
    Twice(u32),
    /// A record that is missing.
    #[error("record {0:#x} is missing")]
    Missing(u32),
    /// A record whose body breaks a rule.
    #[error("record {0:#x}: {1}")]
    Bad(u32, &'static str),
}

impl DeviceState {
    /// As bytes, for a savefile.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut domain = Vec::new();
        for word in [self.xen.0, self.xen.1, self.vcpus, self.layout.runs().len() as u32] {
            domain.extend(word.to_le_bytes());
        }
        for run in self.layout.runs() {
            domain.extend(run.first.0.to_le_bytes());
            domain.extend(run.count.0.to_le_bytes());
        }
        let mut tsc = Vec::new();
        tsc.extend(self.tsc.mode.to_le_bytes());
        tsc.extend(self.tsc.khz.to_le_bytes());
        tsc.extend(self.tsc.nsec.to_le_bytes());
        tsc.extend(self.tsc.incarnation.to_le_bytes());
        tsc.extend(0u32.to_le_bytes());
        let mut params = Vec::new();
        params.extend((self.hvm_params.len() as u32).to_le_bytes());
        params.extend(0u32.to_le_bytes());
        for (index, value) in &self.hvm_params {
            params.extend(index.to_le_bytes());
            params.extend(value.to_le_bytes());
        }
        let mut bytes = Vec::new();
        put(&mut bytes, DOMAIN, &domain);
        put(&mut bytes, CPUID, &self.cpuid_policy);
        put(&mut bytes, MSRS, &self.msr_policy);
        put(&mut bytes, TSC, &tsc);
        put(&mut bytes, PARAMS, &params);
        put(&mut bytes, CONTEXT, &self.hvm_context);
        put(&mut bytes, END, &[]);
        bytes
    }

    /// From the bytes of a savefile.
    pub fn parse(bytes: &[u8]) -> Result<DeviceState, DeviceStateError> {
        if bytes.len() as u64 > DEVICE_STATE_MAX.0 {
            return Err(DeviceStateError::TooLarge(bytes.len() as u64));
        }
        let mut found = Found::default();
        let mut at = 0;
        loop {
            let (kind, body, next) = record(bytes, at)?;
            let place = match kind {
                END if !body.is_empty() => return Err(DeviceStateError::Bad(END, "it has a body")),
                END if next < bytes.len() => return Err(DeviceStateError::Trailing(bytes.len() - next)),
                END => return found.state(),
                DOMAIN => &mut found.domain,
                TSC => &mut found.tsc,
                CONTEXT => &mut found.context,
                PARAMS => &mut found.params,
                CPUID => &mut found.cpuid,
                MSRS => &mut found.msrs,
                other if other & OPTIONAL != 0 => {
                    at = next;
                    continue;
                }
                other => return Err(DeviceStateError::Unknown(other, at)),
            };
            if place.replace(body).is_some() {
                return Err(DeviceStateError::Twice(kind));
            }
            at = next;
        }
    }
}

/// The bodies of the records.
#[derive(Default)]
struct Found<'a> {
    domain: Option<&'a [u8]>,
    tsc: Option<&'a [u8]>,
    context: Option<&'a [u8]>,
    params: Option<&'a [u8]>,
    cpuid: Option<&'a [u8]>,
    msrs: Option<&'a [u8]>,
}

impl Found<'_> {
    fn state(self) -> Result<DeviceState, DeviceStateError> {
        use DeviceStateError::{Bad, Missing};
        let domain = self.domain.ok_or(Missing(DOMAIN))?;
        let ([major, minor, vcpus, count], runs) =
            words::<4>(domain).ok_or(Bad(DOMAIN, "it is too short"))?;
        if !(1..=VCPUS_MAX).contains(&vcpus) {
            return Err(Bad(DOMAIN, "no guest has so many vCPUs"));
        }
        let runs = pairs(runs, count).ok_or(Bad(DOMAIN, "its length does not fit its count"))?;
        let runs = runs.into_iter().map(|(first, count)| PageRange::new(first, count)).collect();
        let layout = Layout::new(runs).map_err(|rule| Bad(DOMAIN, rule))?;

        let tsc = self.tsc.ok_or(Missing(TSC))?;
        let ([mode, khz, nsec_low, nsec_high, incarnation, zero], rest) =
            words::<6>(tsc).ok_or(Bad(TSC, "it is too short"))?;
        if zero != 0 || !rest.is_empty() {
            return Err(Bad(TSC, "it is too long"));
        }
        let nsec = u64::from(nsec_high) << 32 | u64::from(nsec_low);

        let params = self.params.ok_or(Missing(PARAMS))?;
        let ([count, zero], params) = words::<2>(params).ok_or(Bad(PARAMS, "it is too short"))?;
        if zero != 0 {
            return Err(Bad(PARAMS, "a reserved word is not zero"));
        }
        let hvm_params = pairs(params, count).ok_or(Bad(PARAMS, "its length does not fit its count"))?;

        let cpuid = self.cpuid.ok_or(Missing(CPUID))?;
        if cpuid.is_empty() || cpuid.len() % CPUID_LEAF_BYTES != 0 {
            return Err(Bad(CPUID, "it is no whole number of leaves"));
        }
        let msrs = self.msrs.ok_or(Missing(MSRS))?;
        if msrs.len() % MSR_ENTRY_BYTES != 0 {
            return Err(Bad(MSRS, "it is no whole number of MSRs"));
        }
        let context = self.context.ok_or(Missing(CONTEXT))?;
        if context.is_empty() {
            return Err(Bad(CONTEXT, "it is empty"));
        }
        Ok(DeviceState {
            xen: (major, minor),
            vcpus,
            layout,
            tsc: TscInfo { mode, khz, nsec, incarnation },
            hvm_context: context.to_vec(),
            hvm_params,
            cpuid_policy: cpuid.to_vec(),
            msr_policy: msrs.to_vec(),
        })
    }
}

/// Appends a record.
fn put(bytes: &mut Vec<u8>, kind: u32, body: &[u8]) {
    bytes.extend(kind.to_le_bytes());
    bytes.extend((body.len() as u32).to_le_bytes());
    bytes.extend(body);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

/// The record at `at`: its type, its body, and where the next one begins.
fn record(bytes: &[u8], at: usize) -> Result<(u32, &[u8], usize), DeviceStateError> {
    let truncated = DeviceStateError::Truncated(at);
    let rest = bytes.get(at..).unwrap_or_default();
    let ([kind, length], rest) = words::<2>(rest).ok_or(truncated.clone())?;
    let length = length as usize;
    let padded = length.checked_next_multiple_of(8).ok_or(truncated.clone())?;
    let body = rest.get(..padded).ok_or(truncated)?;
    let (body, padding) = body.split_at(length);
    if padding.iter().any(|byte| *byte != 0) {
        return Err(DeviceStateError::Bad(kind, "its padding is not zero"));
    }
    Ok((kind, body, at + 8 + padded))
}

/// The first `N` words and what follows them.
fn words<const N: usize>(bytes: &[u8]) -> Option<([u32; N], &[u8])> {
    let (head, rest) = bytes.split_at_checked(4 * N)?;
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(head.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    Some((words, rest))
}

/// All of `bytes` as exactly `count` pairs.
fn pairs(bytes: &[u8], count: u32) -> Option<Vec<(u64, u64)>> {
    let (numbers, rest) = bytes.as_chunks::<8>();
    if numbers.len() as u64 != 2 * u64::from(count) || !rest.is_empty() {
        return None;
    }
    let (pairs, _) = numbers.as_chunks::<2>();
    Some(pairs.iter().map(|[one, two]| (u64::from_le_bytes(*one), u64::from_le_bytes(*two))).collect())
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn layouts()(parts in vec((1u64..1000, 1u64..1000), 0..20)) -> Layout {
            let mut next = 0;
            let runs = parts.into_iter().map(|(gap, count)| {
                let run = PageRange::new(next + gap, count);
                next = run.end().0;
                run
            });
            Layout::new(runs.collect()).unwrap()
        }
    }

    prop_compose! {
        fn states()(
            xen in any::<(u32, u32)>(), vcpus in 1..=VCPUS_MAX, layout in layouts(),
            (mode, khz, nsec, incarnation) in any::<(u32, u32, u64, u32)>(),
            hvm_context in vec(any::<u8>(), 1..100), hvm_params in vec(any::<(u64, u64)>(), 0..10),
            leaves in 1usize..10, msrs in 0usize..10, fill in any::<u8>(),
        ) -> DeviceState {
            DeviceState {
                xen, vcpus, layout, hvm_context, hvm_params,
                tsc: TscInfo { mode, khz, nsec, incarnation },
                cpuid_policy: vec![fill; leaves * CPUID_LEAF_BYTES],
                msr_policy: vec![fill; msrs * MSR_ENTRY_BYTES],
            }
        }
    }

    fn state() -> DeviceState {
        DeviceState {
            xen: (4, 17),
            vcpus: 2,
            layout: Layout::new(vec![PageRange::new(0, 9)]).unwrap(),
            tsc: TscInfo { mode: 1, khz: 2, nsec: 3, incarnation: 4 },
            hvm_context: vec![7; 9],
            hvm_params: vec![(1, 2)],
            cpuid_policy: vec![1; 24],
            msr_policy: vec![],
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_as_the_same(state in states()) {
            prop_assert_eq!(DeviceState::parse(&state.to_bytes()), Ok(state));
        }

        #[test]
        fn any_bytes_are_answered(bytes in vec(any::<u8>(), 0..200)) {
            let _ = DeviceState::parse(&bytes);
        }

        /// A changed word either breaks a rule or reads as another state; it never panics, and never reads as the same.
        #[test]
        fn one_changed_word_is_noticed(state in states(), place in any::<prop::sample::Index>(), word in any::<u32>()) {
            let mut bytes = state.to_bytes();
            let at = place.index(bytes.len() / 4) * 4;
            prop_assume!(bytes[at..at + 4] != word.to_le_bytes());
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
            prop_assert_ne!(DeviceState::parse(&bytes), Ok(state));
        }
    }

    #[test]
    fn every_prefix_is_refused() {
        let bytes = state().to_bytes();
        for length in 0..bytes.len() {
            assert!(DeviceState::parse(&bytes[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn records_are_there_once_and_known() {
        let bytes = state().to_bytes();
        let insert = |kind: u32, body: &[u8]| {
            let mut more = Vec::new();
            put(&mut more, kind, body);
            more.extend(&bytes);
            DeviceState::parse(&more)
        };
        assert_eq!(insert(MSRS, &[]), Err(DeviceStateError::Twice(MSRS)));
        assert_eq!(insert(0x33, b"?"), Err(DeviceStateError::Unknown(0x33, 0)));
        assert_eq!(insert(OPTIONAL | 0x33, b"?"), Ok(state()));
        assert_eq!(insert(END, &[]), Err(DeviceStateError::Trailing(bytes.len())));
        let mut end = Vec::new();
        put(&mut end, END, &[]);
        assert_eq!(DeviceState::parse(&end), Err(DeviceStateError::Missing(DOMAIN)));
    }

    #[test]
    fn the_bytes_are_those_the_table_says() {
        let bytes = state().to_bytes();
        let domain = [
            0x8000_0001u32,
            32,
            4,
            17,
            2,
            1,
            0,
            0,
            9,
            0, // the run 0+9
        ];
        let domain: Vec<u8> = domain.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(bytes[..40], domain);
        assert_eq!(bytes[bytes.len() - 8..], [0; 8]);
    }
}
