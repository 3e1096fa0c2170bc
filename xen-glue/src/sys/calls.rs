//! Each function of [`Hypercalls`] as the hypercall it is.

use std::mem::size_of;

use engine::units::{ByteCount, PageCount, PAGE_BYTES};
use nix::errno::Errno;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::buffer::Buffer;
use super::mapping::Pages;
use super::privcmd::{refused, Privcmd};
use crate::abi::{domctl, hvm, hypercall, memory, sysctl, Operation};
use crate::device_state::{TscInfo, CPUID_LEAF_BYTES, MSR_ENTRY_BYTES};
use crate::hypercalls::{
    CallError, CpuPolicy, DomId, DomainInfo, FrameKind, Hypercalls, Mapping, NewDomain, PhysInfo, Result,
    Uuid, XenVersion,
};

/// The most event channels a PVH guest has, as libxl sets it.
const EVTCHN_PORT_MAX: u32 = 1023;

impl Privcmd {
    fn create_with(&self, domain: &NewDomain, grant_version: u32) -> Result<DomId> {
        let common = domctl::CreateCommon {
            ssidref: 0,
            handle: domain.uuid.0,
            flags: domctl::CDF_HVM | if self.hap { domctl::CDF_HAP } else { 0 },
            iommu_opts: 0,
            max_vcpus: domain.vcpus,
            max_evtchn_port: EVTCHN_PORT_MAX,
            max_grant_frames: -1,
            max_maptrack_frames: -1,
            grant_opts: grant_version,
        };
        let rest = domctl::CreateRest {
            vmtrace_size: 0,
            cpupool_id: 0,
            emulation_flags: domctl::EMULATE_LAPIC,
            misc_flags: 0,
        };
        // Domain 0 stands for "choose a number"; the answer has it in the same place.
        let mut argument = [0u8; size_of::<domctl::CreateAltp2m>()];
        if self.version.domctl >= domctl::VERSION_WITH_ALTP2M {
            argument.copy_from_slice(domctl::CreateAltp2m { common, altp2m: 0, rest }.as_bytes());
        } else {
            let old = domctl::Create { common, rest };
            argument[..size_of::<domctl::Create>()].copy_from_slice(old.as_bytes());
        }
        let mut call = domctl::Domctl {
            cmd: domctl::CREATE.number,
            interface_version: self.version.domctl,
            domain: 0,
            pad: [0; 3],
            argument: [0; domctl::ARGUMENT_BYTES],
        };
        call.argument[..argument.len()].copy_from_slice(&argument);
        self.with_argument(hypercall::DOMCTL, None, &mut call)
            .map_err(|errno| refused(domctl::CREATE, None, errno))?;
        Ok(DomId(call.domain))
    }

    /// Asks for a policy twice: without room for it, which answers how many leaves and MSRs it has, then with. `ask` gets the
    /// two counts and the two addresses.
    fn policy(
        &self,
        operation: Operation,
        domid: Option<DomId>,
        ask: impl Fn((u32, u32), (u64, u64)) -> Result<(u32, u32)>,
    ) -> Result<CpuPolicy> {
        let bytes = |(leaves, msrs): (u32, u32)| {
            (leaves as usize * CPUID_LEAF_BYTES, msrs as usize * MSR_ENTRY_BYTES)
        };
        let counts = ask((0, 0), (0, 0))?;
        let (leaf_bytes, msr_bytes) = bytes(counts);
        let mut leaves = self.answer(operation, domid, leaf_bytes)?;
        let mut msrs = self.answer(operation, domid, msr_bytes)?;
        let (leaf_bytes, msr_bytes) = bytes(ask(counts, (leaves.address(), msrs.address()))?);
        let policy =
            CpuPolicy { leaves: copied(&mut leaves, leaf_bytes), msrs: copied(&mut msrs, msr_bytes) };
        self.buffers.give_back(leaves);
        self.buffers.give_back(msrs);
        Ok(policy)
    }
}

impl Hypercalls for Privcmd {
    fn version(&self) -> &XenVersion {
        &self.version
    }

    fn physinfo(&self) -> Result<PhysInfo> {
        let mut info = sysctl::PhysInfo::new_zeroed();
        self.sysctl(sysctl::PHYSINFO, &mut info)?;
        let bytes = |pages| PageCount(pages).bytes();
        Ok(PhysInfo {
            free: bytes(info.free_pages),
            total: bytes(info.total_pages),
            scrubbing: bytes(info.scrub_pages),
            hvm: info.capabilities & sysctl::CAPABILITY_HVM != 0
                && info.capabilities & (sysctl::CAPABILITY_HAP | sysctl::CAPABILITY_SHADOW) != 0,
            hap: info.capabilities & sysctl::CAPABILITY_HAP != 0,
        })
    }

    fn max_policy(&self) -> Result<CpuPolicy> {
        self.policy(sysctl::GET_POLICY, None, |counts, (leaves_address, msrs_address)| {
            let index = sysctl::POLICY_HVM_MAX;
            let (leaf_count, msr_count) = counts;
            let mut policy =
                sysctl::Policy { index, leaf_count, msr_count, pad: 0, leaves_address, msrs_address };
            self.sysctl(sysctl::GET_POLICY, &mut policy)?;
            Ok((policy.leaf_count, policy.msr_count))
        })
    }

    fn create(&self, domain: &NewDomain) -> Result<DomId> {
        let mut result = Err(refused(domctl::CREATE, None, Errno::EINVAL));
        for grant_version in domctl::GRANT_VERSIONS {
            result = self.create_with(domain, grant_version);
            // A Xen whose administrator forbade version 2 says so with EINVAL.
            if !matches!(result, Err(CallError::Refused { errno: Errno::EINVAL, .. })) {
                break;
            }
        }
        result
    }

    fn destroy(&self, domid: DomId) -> Result<()> {
        loop {
            // Large domains are taken down piece by piece; between them Xen lets others in.
            match self.raw_domctl(domctl::DESTROY, domid, &mut [0u8; 0]) {
                Err(Errno::EAGAIN) => continue,
                result => return result.map_err(|errno| refused(domctl::DESTROY, Some(domid), errno)),
            }
        }
    }

    fn pause(&self, domid: DomId) -> Result<()> {
        self.domctl(domctl::PAUSE, domid, &mut [0u8; 0])
    }

    fn unpause(&self, domid: DomId) -> Result<()> {
        self.domctl(domctl::UNPAUSE, domid, &mut [0u8; 0])
    }

    fn resume_cancelled(&self, domid: DomId) -> Result<()> {
        let operation = domctl::GET_VCPU_CONTEXT;
        let mut context = self.answer(operation, Some(domid), domctl::VCPU_CONTEXT_BYTES)?;
        let mut argument = domctl::VcpuContext { vcpu: 0, pad: 0, address: context.address() };
        self.domctl(operation, domid, &mut argument)?;
        let rax = domctl::VCPU_CONTEXT_RAX;
        context.bytes()[rax..rax + 8].copy_from_slice(&1u64.to_le_bytes());
        self.domctl(domctl::SET_VCPU_CONTEXT, domid, &mut argument)?;
        self.buffers.give_back(context);
        self.domctl(domctl::RESUME, domid, &mut [0u8; 0])
    }

    fn info(&self, domid: DomId) -> Result<Option<DomainInfo>> {
        let mut info = domctl::Info::new_zeroed();
        match self.raw_domctl(domctl::INFO, domid, &mut info) {
            // Xen 4.17 answers with the next domain there is.
            Ok(()) if info.domain != domid.0 => Ok(None),
            Ok(()) => Ok(Some(domain_info(&info))),
            Err(Errno::ESRCH) => Ok(None),
            Err(errno) => Err(refused(domctl::INFO, Some(domid), errno)),
        }
    }

    fn list(&self) -> Result<Vec<DomainInfo>> {
        const BATCH: usize = 256;
        let operation = sysctl::LIST;
        let mut buffer = self.answer(operation, None, BATCH * size_of::<domctl::Info>())?;
        let mut domains = Vec::new();
        let mut first = 1;
        loop {
            let mut list = sysctl::List::new_zeroed();
            (list.first, list.max, list.address) = (first, BATCH as u32, buffer.address());
            self.sysctl(operation, &mut list)?;
            let count = BATCH.min(list.count as usize);
            for bytes in buffer.bytes().chunks_exact(size_of::<domctl::Info>()).take(count) {
                if let Ok(info) = domctl::Info::read_from_bytes(bytes) {
                    domains.push(domain_info(&info));
                }
            }
            match domains.last() {
                Some(last) if count == BATCH => first = last.domid.0.saturating_add(1),
                _ => break,
            }
        }
        self.buffers.give_back(buffer);
        Ok(domains)
    }

    fn set_max_memory(&self, domid: DomId, max: ByteCount) -> Result<()> {
        self.domctl(domctl::MAX_MEM, domid, &mut max.0.div_ceil(1024))
    }

    fn set_max_vcpus(&self, domid: DomId, vcpus: u32) -> Result<()> {
        self.domctl(domctl::MAX_VCPUS, domid, &mut vcpus.clone())
    }

    fn set_paging_pool(&self, domid: DomId, size: ByteCount) -> Result<()> {
        self.domctl(domctl::SET_PAGING_POOL, domid, &mut size.0.clone())
    }

    fn set_memory_map(&self, domid: DomId, map: &[(u64, u64, u32)]) -> Result<()> {
        let mut bytes = Vec::with_capacity(map.len() * memory::E820_ENTRY_BYTES);
        for (start, size, kind) in map {
            bytes.extend(start.to_le_bytes());
            bytes.extend(size.to_le_bytes());
            bytes.extend(kind.to_le_bytes());
        }
        let entries = self.buffer(memory::SET_MAP, Some(domid), &bytes)?;
        let mut argument = memory::ForeignMemoryMap {
            domid: domid.0,
            pad1: [0; 3],
            entry_count: map.len() as u32,
            pad2: 0,
            entries_address: entries.address(),
        };
        self.operation(hypercall::MEMORY_OP, memory::SET_MAP, domid, &mut argument)?;
        self.buffers.give_back(entries);
        Ok(())
    }

    fn populate(&self, domid: DomId, first: &[u64], order: u32) -> Result<()> {
        let extents = self.buffer(memory::POPULATE, Some(domid), first.as_bytes())?;
        let mut argument = memory::Reservation {
            extents_address: extents.address(),
            extent_count: first.len() as u64,
            extent_order: order,
            mem_flags: 0,
            domid: domid.0,
            pad: [0; 3],
        };
        let done = self.operation(hypercall::MEMORY_OP, memory::POPULATE, domid, &mut argument)?;
        self.buffers.give_back(extents);
        let wanted = first.len() as u64;
        if done != wanted {
            return Err(CallError::Short { call: memory::POPULATE.name, domid: Some(domid), done, wanted });
        }
        Ok(())
    }

    fn max_gfn(&self, domid: DomId) -> Result<u64> {
        self.operation(hypercall::MEMORY_OP, memory::MAXIMUM_GPFN, domid, &mut domid.0.clone())
    }

    fn frame_kinds(&self, domid: DomId, gfns: &[u64]) -> Result<Vec<FrameKind>> {
        let operation = domctl::FRAME_KINDS;
        if gfns.len() > domctl::FRAMES_MAX {
            return Err(refused(operation, Some(domid), Errno::E2BIG));
        }
        let mut frames = self.buffer(operation, Some(domid), gfns.as_bytes())?;
        let mut argument = domctl::FrameInfo { count: gfns.len() as u64, address: frames.address() };
        self.domctl(operation, domid, &mut argument)?;
        let (kinds, _) = frames.bytes().as_chunks::<8>();
        let kinds = kinds.iter().take(gfns.len()).map(|bytes| match u64::from_le_bytes(*bytes) {
            kind if kind < domctl::FRAME_BROKEN => FrameKind::Ram,
            _ => FrameKind::None,
        });
        let kinds = kinds.collect();
        self.buffers.give_back(frames);
        Ok(kinds)
    }

    fn map(&self, domid: DomId, gfns: &[u64]) -> Result<Box<dyn Mapping>> {
        match Pages::of_frames(&self.device, domid.0, gfns) {
            Ok(pages) => Ok(Box::new(pages)),
            Err(bad) => Err(CallError::Frame {
                domid,
                gfn: gfns.get(bad.index).copied().unwrap_or_default(),
                errno: bad.errno,
            }),
        }
    }

    fn hvm_context(&self, domid: DomId) -> Result<Vec<u8>> {
        let operation = domctl::GET_HVM_CONTEXT;
        let mut argument = domctl::HvmContext { size: 0, pad: 0, address: 0 };
        self.domctl(operation, domid, &mut argument)?;
        let mut context = self.answer(operation, Some(domid), argument.size as usize)?;
        argument.address = context.address();
        self.domctl(operation, domid, &mut argument)?;
        let answer = copied(&mut context, argument.size as usize);
        self.buffers.give_back(context);
        Ok(answer)
    }

    fn set_hvm_context(&self, domid: DomId, context: &[u8]) -> Result<()> {
        let operation = domctl::SET_HVM_CONTEXT;
        let buffer = self.buffer(operation, Some(domid), context)?;
        let size = context.len() as u32;
        self.domctl(operation, domid, &mut domctl::HvmContext { size, pad: 0, address: buffer.address() })?;
        self.buffers.give_back(buffer);
        Ok(())
    }

    fn hvm_param(&self, domid: DomId, index: u64) -> Result<u64> {
        let mut param = hvm_param(domid, index, 0);
        self.operation(hypercall::HVM_OP, hvm::GET_PARAM, domid, &mut param)?;
        Ok(param.value)
    }

    fn set_hvm_param(&self, domid: DomId, index: u64, value: u64) -> Result<()> {
        let mut param = hvm_param(domid, index, value);
        self.operation(hypercall::HVM_OP, hvm::SET_PARAM, domid, &mut param).map(drop)
    }

    fn cpu_policy(&self, domid: DomId) -> Result<CpuPolicy> {
        self.policy(domctl::GET_POLICY, Some(domid), |counts, (leaves_address, msrs_address)| {
            let mut policy = domctl::Policy::new_zeroed();
            (policy.leaf_count, policy.msr_count) = counts;
            (policy.leaves_address, policy.msrs_address) = (leaves_address, msrs_address);
            self.domctl(domctl::GET_POLICY, domid, &mut policy)?;
            Ok((policy.leaf_count, policy.msr_count))
        })
    }

    fn set_cpu_policy(&self, domid: DomId, policy: &CpuPolicy) -> Result<()> {
        let operation = domctl::SET_POLICY;
        let leaves = self.buffer(operation, Some(domid), &policy.leaves)?;
        let msrs = self.buffer(operation, Some(domid), &policy.msrs)?;
        let mut argument = domctl::Policy {
            leaf_count: (policy.leaves.len() / CPUID_LEAF_BYTES) as u32,
            msr_count: (policy.msrs.len() / MSR_ENTRY_BYTES) as u32,
            leaves_address: leaves.address(),
            msrs_address: msrs.address(),
            err_leaf: domctl::POLICY_NOT_THAT,
            err_subleaf: domctl::POLICY_NOT_THAT,
            err_msr: domctl::POLICY_NOT_THAT,
            pad: 0,
        };
        let result = self.raw_domctl(operation, domid, &mut argument);
        self.buffers.give_back(leaves);
        self.buffers.give_back(msrs);
        let named = |value| Some(value).filter(|value| *value != domctl::POLICY_NOT_THAT);
        match (result, named(argument.err_leaf), named(argument.err_msr)) {
            (Ok(()), ..) => Ok(()),
            (Err(errno), None, None) => Err(refused(operation, Some(domid), errno)),
            (Err(errno), leaf, msr) => {
                let leaf = leaf.map(|leaf| (leaf, named(argument.err_subleaf)));
                Err(CallError::Policy { domid, leaf, msr, errno })
            }
        }
    }

    fn tsc(&self, domid: DomId) -> Result<TscInfo> {
        let mut tsc = domctl::Tsc::new_zeroed();
        self.domctl(domctl::GET_TSC, domid, &mut tsc)?;
        Ok(TscInfo { mode: tsc.mode, khz: tsc.khz, nsec: tsc.elapsed_nsec, incarnation: tsc.incarnation })
    }

    fn set_tsc(&self, domid: DomId, tsc: &TscInfo) -> Result<()> {
        let mut argument = domctl::Tsc {
            mode: tsc.mode,
            khz: tsc.khz,
            incarnation: tsc.incarnation,
            pad: 0,
            elapsed_nsec: tsc.nsec,
        };
        self.domctl(domctl::SET_TSC, domid, &mut argument)
    }

    fn alloc_port(&self, domid: DomId, remote: DomId) -> Result<u32> {
        let mut argument = memory::AllocUnbound { domid: domid.0, remote: remote.0, port: 0 };
        self.operation(hypercall::EVENT_CHANNEL_OP, memory::ALLOC_UNBOUND, domid, &mut argument)?;
        Ok(argument.port)
    }

    fn seed_grants(&self, domid: DomId, entries: &[(u32, DomId, u64)]) -> Result<()> {
        let operation = memory::ACQUIRE_RESOURCE;
        let kind = memory::RESOURCE_GRANT_TABLE;
        let refused = |errno| refused(operation, Some(domid), errno);
        let table = Pages::of_resource(&self.device, domid.0, kind, 0, 1).map_err(refused)?;
        for (index, to, frame) in entries {
            let offset = *index as usize * memory::GRANT_ENTRY_BYTES;
            let frame = u32::try_from(*frame).map_err(|_| refused(Errno::ERANGE))?;
            if offset + memory::GRANT_ENTRY_BYTES > PAGE_BYTES {
                return Err(refused(Errno::ERANGE));
            }
            let mut entry = [0; memory::GRANT_ENTRY_BYTES];
            entry[..2].copy_from_slice(&memory::GRANT_PERMIT_ACCESS.to_le_bytes());
            entry[2..4].copy_from_slice(&to.0.to_le_bytes());
            entry[4..].copy_from_slice(&frame.to_le_bytes());
            table.copy_from(offset, &entry);
        }
        Ok(())
    }
}

/// The first `bytes` bytes of an answer, or as many as were made room for.
fn copied(buffer: &mut Buffer, bytes: usize) -> Vec<u8> {
    let room = buffer.bytes();
    room[..bytes.min(room.len())].to_vec()
}

fn hvm_param(domid: DomId, index: u64, value: u64) -> hvm::Param {
    // No Xen has parameters past 32 bits: such an index is as unknown to it as any.
    let index = u32::try_from(index).unwrap_or(u32::MAX);
    hvm::Param { domid: domid.0, pad: 0, index, value }
}

fn domain_info(info: &domctl::Info) -> DomainInfo {
    DomainInfo {
        domid: DomId(info.domain),
        uuid: Uuid(info.handle),
        flags: info.flags,
        pages: PageCount(info.tot_pages),
        pages_max: PageCount(info.max_pages),
    }
}
