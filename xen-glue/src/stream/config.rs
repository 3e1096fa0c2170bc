//! A guest's configuration as xl keeps it in a stream: libxl_domain_config as JSON.
//!
//! Read tolerantly: what is not needed here may be anything, and is lost. Written so that `xl restore` of Xen 4.17 takes it;
//! what is left out gets libxl's defaults.
//!
//! Source: `tools/libs/light/libxl_types.idl` of Xen 4.17.

use engine::units::ByteCount;
use serde::Deserialize;
use serde_json::{json, Value};

use super::xl_header::ConfigText;
use super::Fault;
use crate::hypercalls::Uuid;

/// More devices of a kind no guest here has.
const DEVICES_MAX: usize = 64;
/// 16 TiB, as the frames of a guest.
const MEMORY_KIB_MAX: u64 = 16 << 30;

/// A guest as its configuration has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestConfig {
    /// Its name.
    pub name: String,
    /// Its handle.
    pub uuid: Uuid,
    /// `pvh`, `pv` or `hvm`.
    pub kind: String,
    /// The most memory it may have.
    pub memory_max: ByteCount,
    /// What it was to have when it was saved.
    pub memory_target: ByteCount,
    /// How many vCPUs.
    pub vcpus: u32,
    /// The kernel it was booted from, a path on the machine it ran on.
    pub kernel: Option<String>,
    /// The initrd.
    pub ramdisk: Option<String>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Its disks.
    pub disks: Vec<DiskConfig>,
    /// Its network cards.
    pub nics: Vec<NicConfig>,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// The file or block device, a path on the machine it ran on.
    pub path: String,
    /// What the guest calls it: `xvda`.
    pub vdev: String,
    /// `raw`, `qcow2`, ….
    pub format: String,
    /// Whether the guest may write to it.
    pub writable: bool,
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicConfig {
    /// Its number, from 0 on.
    pub devid: u32,
    /// Its address: `00:16:3e:…`.
    pub mac: Option<String>,
    /// The bridge it is plugged into.
    pub bridge: Option<String>,
    /// The script that plugs it in.
    pub script: Option<String>,
}

#[derive(Deserialize)]
struct RawConfig {
    c_info: RawCreate,
    b_info: RawBuild,
    #[serde(default)]
    disks: Vec<RawDisk>,
    #[serde(default)]
    nics: Vec<RawNic>,
}

#[derive(Deserialize)]
struct RawCreate {
    #[serde(rename = "type")]
    kind: String,
    name: Option<String>,
    uuid: Option<String>,
}

#[derive(Deserialize)]
struct RawBuild {
    max_vcpus: Option<u32>,
    max_memkb: u64,
    target_memkb: Option<u64>,
    kernel: Option<String>,
    ramdisk: Option<String>,
    cmdline: Option<String>,
}

#[derive(Deserialize)]
struct RawDisk {
    pdev_path: Option<String>,
    vdev: String,
    format: Option<String>,
    #[serde(default)]
    readwrite: i64,
}

#[derive(Deserialize)]
struct RawNic {
    devid: Option<u32>,
    mac: Option<String>,
    bridge: Option<String>,
    script: Option<String>,
}

impl GuestConfig {
    /// Reads a configuration. An xl.cfg is refused: it is a program's language, and xl writes none by itself.
    pub fn parse(text: &ConfigText) -> Result<GuestConfig, Fault> {
        let ConfigText::Json(text) = text else {
            return Err(Fault::Text(
                "it is an xl.cfg, not JSON: save the guest without a configuration".into(),
            ));
        };
        let raw: RawConfig = serde_json::from_str(text).map_err(|error| Fault::Text(error.to_string()))?;
        if raw.disks.len() > DEVICES_MAX || raw.nics.len() > DEVICES_MAX {
            return Err(Fault::Text(format!("it has more than {DEVICES_MAX} disks or network cards")));
        }
        let RawBuild { max_vcpus, max_memkb, target_memkb, kernel, ramdisk, cmdline } = raw.b_info;
        let uuid = raw.c_info.uuid.unwrap_or_default();
        let present = |text: Option<String>| text.filter(|text| !text.is_empty());
        Ok(GuestConfig {
            name: raw.c_info.name.unwrap_or_default(),
            uuid: parse_uuid(&uuid).ok_or_else(|| Fault::Text(format!("{uuid:?} is no UUID")))?,
            kind: raw.c_info.kind,
            memory_max: kib(max_memkb)?,
            memory_target: kib(target_memkb.unwrap_or(max_memkb))?,
            vcpus: max_vcpus.unwrap_or(1),
            kernel: present(kernel),
            ramdisk: present(ramdisk),
            cmdline: cmdline.unwrap_or_default(),
            disks: raw.disks.into_iter().map(DiskConfig::from_raw).collect(),
            nics: raw.nics.into_iter().enumerate().map(NicConfig::from_raw).collect(),
        })
    }

    /// The configuration as xl writes it into a stream.
    pub fn to_text(&self) -> ConfigText {
        let vcpus: Vec<u32> = (0..self.vcpus).collect();
        let mut build = json!({
            "max_vcpus": self.vcpus,
            "avail_vcpus": vcpus,
            "max_memkb": self.memory_max.0 >> 10,
            "target_memkb": self.memory_target.0 >> 10,
            "video_memkb": 0,
            "cmdline": self.cmdline,
            (format!("type.{}", self.kind)): {},
        });
        set(&mut build, "kernel", self.kernel.as_deref());
        set(&mut build, "ramdisk", self.ramdisk.as_deref());
        let config = json!({
            "c_info": { "type": self.kind, "name": self.name, "uuid": self.uuid.to_string() },
            "b_info": build,
            "disks": self.disks.iter().map(DiskConfig::to_json).collect::<Vec<_>>(),
            "nics": self.nics.iter().map(NicConfig::to_json).collect::<Vec<_>>(),
        });
        ConfigText::Json(format!("{config:#}\n"))
    }
}

impl DiskConfig {
    fn from_raw(raw: RawDisk) -> DiskConfig {
        DiskConfig {
            path: raw.pdev_path.unwrap_or_default(),
            vdev: raw.vdev,
            format: raw.format.unwrap_or_else(|| "raw".into()),
            writable: raw.readwrite != 0,
        }
    }

    fn to_json(&self) -> Value {
        json!({
            "pdev_path": self.path,
            "vdev": self.vdev,
            "format": self.format,
            "readwrite": i32::from(self.writable),
        })
    }
}

impl NicConfig {
    fn from_raw((at, raw): (usize, RawNic)) -> NicConfig {
        let RawNic { devid, mac, bridge, script } = raw;
        NicConfig { devid: devid.unwrap_or(at as u32), mac, bridge, script }
    }

    fn to_json(&self) -> Value {
        let mut nic = json!({ "devid": self.devid, "nictype": "vif" });
        set(&mut nic, "mac", self.mac.as_deref());
        set(&mut nic, "bridge", self.bridge.as_deref());
        set(&mut nic, "script", self.script.as_deref());
        nic
    }
}

fn set(object: &mut Value, key: &str, value: Option<&str>) {
    if let (Some(object), Some(value)) = (object.as_object_mut(), value) {
        object.insert(key.into(), value.into());
    }
}

fn kib(kib: u64) -> Result<ByteCount, Fault> {
    match kib {
        1..=MEMORY_KIB_MAX => Ok(ByteCount(kib << 10)),
        _ => Err(Fault::Value { what: "memory in KiB", value: kib }),
    }
}

/// 8-4-4-4-12 hexadecimal digits.
fn parse_uuid(text: &str) -> Option<Uuid> {
    let groups: Vec<&str> = text.split('-').collect();
    if !groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12]) {
        return None;
    }
    let digits: Option<Vec<u8>> =
        groups.concat().chars().map(|digit| Some(digit.to_digit(16)? as u8)).collect();
    let (pairs, _) = digits.as_deref()?.as_chunks::<2>();
    let bytes: Vec<u8> = pairs.iter().map(|[high, low]| high << 4 | low).collect();
    bytes.try_into().ok().map(Uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn sample() -> GuestConfig {
        GuestConfig {
            name: "debian-dvm".into(),
            uuid: Uuid(*b"0123456789abcdef"),
            kind: "pvh".into(),
            memory_max: ByteCount(128 << 20),
            memory_target: ByteCount(96 << 20),
            vcpus: 2,
            kernel: Some("/boot/vmlinuz".into()),
            ramdisk: None,
            cmdline: "console=hvc0 \"quoted\"".into(),
            disks: vec![DiskConfig {
                path: "/data/root.img".into(),
                vdev: "xvda".into(),
                format: "raw".into(),
                writable: true,
            }],
            nics: vec![NicConfig {
                devid: 0,
                mac: Some("00:16:3e:00:00:01".into()),
                bridge: Some("xenbr0".into()),
                script: None,
            }],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(GuestConfig::parse(&sample().to_text()).unwrap(), sample());
    }

    /// As `xl save` of Xen 4.17 writes it, shortened.
    #[test]
    fn what_xl_writes_is_read() {
        let text = r#"{ "c_info": { "type": "pvh", "name": "g", "run_hotplug_scripts": "True",
              "uuid": "496f60b2-abb2-463d-b08f-d8594d33bec6" },
            "b_info": { "max_vcpus": 2, "avail_vcpus": [0, 1], "max_memkb": 131072, "target_memkb": 131072,
              "sched_params": { "sched": "credit2", "weight": 256 }, "kernel": "/boot/vmlinuz-guest",
              "cmdline": "console=hvc0", "ramdisk": "/boot/guest.cpio", "type.pvh": {}, "arch_x86": { "msr_relaxed": "False" } },
            "disks": [ { "pdev_path": "/data/root.img", "vdev": "xvda", "format": "raw", "readwrite": 1,
              "colo_restore_enable": "False" } ],
            "on_crash": "preserve" }"#;
        let config = GuestConfig::parse(&ConfigText::Json(text.into())).unwrap();
        assert_eq!(config.uuid.to_string(), "496f60b2-abb2-463d-b08f-d8594d33bec6");
        assert_eq!((config.vcpus, config.memory_max), (2, ByteCount(128 << 20)));
        assert_eq!((config.disks[0].vdev.as_str(), config.disks[0].writable), ("xvda", true));
        assert!(config.nics.is_empty());
    }

    #[test]
    fn bad_configurations_are_refused() {
        let mut bad: Vec<String> = ["", "[]", "{}", r#"{"c_info":{"type":"pvh"},"b_info":{"max_memkb":1}}"#]
            .map(String::from)
            .into();
        let ConfigText::Json(good) = sample().to_text() else { unreachable!() };
        bad.push(good.replace("131072", "0"));
        bad.push(good.replace("131072", "17179869185"));
        bad.push(good.replace("131072", "-1"));
        bad.push(good.replace("30313233", "3031323g"));
        bad.push(good.replace("\"vdev\"", "\"udev\""));
        for text in bad {
            assert!(GuestConfig::parse(&ConfigText::Json(text.clone())).is_err(), "{text}");
        }
        assert!(GuestConfig::parse(&ConfigText::Cfg("name='x'".into())).is_err());
    }
}
