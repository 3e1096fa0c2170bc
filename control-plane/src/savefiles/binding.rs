//! Which file each disk of a guest to import is, and with that which volume it becomes.
//!
//! Invariants: every disk of the guest's configuration is bound, or the import is refused and names it; a bound file is raw, regular
//! and of a size that its volume can have.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use engine::units::PAGE_SIZE;
use xen_glue::stream::config::DiskConfig;

use crate::error::{Error, Kind, Result};
use crate::templates::VOLUME_MIB;

/// A qube's volumes, and what a guest calls them.
pub const VOLUMES: [(&str, &str); 3] = [("root", "xvda"), ("private", "xvdb"), ("volatile", "xvdc")];
/// How a qcow2 begins: a header where a raw image would have a boot sector or nothing.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// A file for each volume; those the guest does not have are made empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Binding {
    /// Always there: a qube has a root volume.
    pub root: PathBuf,
    /// The private volume.
    pub private: Option<PathBuf>,
    /// The volatile volume.
    pub volatile: Option<PathBuf>,
}

/// Binds a guest's disks to `given` files: by the name of the volume (`root`) or the guest's own (`xvda`).
pub fn bind(disks: &[DiskConfig], given: &[(String, PathBuf)]) -> Result<Binding> {
    let mut files: [Option<PathBuf>; 3] = Default::default();
    for (name, file) in given {
        let slot = VOLUMES.iter().position(|(volume, vdev)| name == volume || name == vdev);
        let slot = slot.and_then(|slot| files.get_mut(slot)).ok_or_else(|| {
            Error::new(Kind::Usage, format!("{name:?} is no disk that a qube has"))
                .hint("root (xvda), private (xvdb) or volatile (xvdc)")
        })?;
        if slot.replace(file.clone()).is_some() {
            return Err(Error::new(Kind::Usage, format!("the disk {name} is given twice")));
        }
    }
    for disk in disks {
        let at = VOLUMES.iter().position(|(_, vdev)| disk.vdev == *vdev).ok_or_else(|| {
            Error::new(Kind::Refused, format!("the guest has a disk {:?} ({})", disk.vdev, disk.path))
                .hint("a qube has xvda, xvdb and xvdc: save the guest without others")
        })?;
        if files.get(at).is_none_or(Option::is_none) {
            return Err(not_bound(&disk.vdev, &format!(", which was {} where it was saved", disk.path)));
        }
    }
    let [root, private, volatile] = files;
    let root = root.ok_or_else(|| not_bound("root", ", and a qube has one"))?;
    for (file, whole_mib) in [(Some(&root), false), (private.as_ref(), true), (volatile.as_ref(), true)] {
        file.map_or(Ok(()), |file| check_file(file, whole_mib))?;
    }
    Ok(Binding { root, private, volatile })
}

fn not_bound(name: &str, more: &str) -> Error {
    Error::new(Kind::Usage, format!("there is no file for the guest's disk {name}{more}"))
        .hint(format!("--disk {name}=FILE, a raw image of it as it was when the guest was saved"))
}

fn check_file(path: &Path, whole_mib: bool) -> Result<()> {
    let meta = fs::metadata(path).map_err(Error::io("look at", path))?;
    let mut magic = [0; 4];
    let unfit = match meta.len() {
        _ if !meta.is_file() => "is no regular file",
        _ if is_qcow2(path, &mut magic)? => "is a qcow2 image, not a raw one",
        0 => "is empty",
        len if len % PAGE_SIZE != 0 => "is no whole number of pages long",
        len if whole_mib && (len % (1 << 20) != 0 || !VOLUME_MIB.contains(&(len >> 20))) => {
            "is not from 32 MiB to 4 TiB long, in whole MiB"
        }
        _ => return Ok(()),
    };
    Err(Error::new(Kind::Usage, format!("{} {unfit}", path.display()))
        .hint("`qemu-img convert -O raw` makes a raw image, `truncate -s` a larger one"))
}

fn is_qcow2(path: &Path, magic: &mut [u8; 4]) -> Result<bool> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    match file.read_exact_at(magic, 0) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        read => read.map(|()| *magic == QCOW2_MAGIC).map_err(Error::io("read", path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(vdev: &str) -> DiskConfig {
        DiskConfig { path: "/old/disk".into(), vdev: vdev.into(), format: "raw".into(), writable: true }
    }

    #[test]
    fn every_disk_is_bound_or_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: u64| {
            let path = folder.path().join(name);
            File::create(&path).unwrap().set_len(bytes).unwrap();
            path
        };
        let (root, private) = (file("root", 8192), file("private", 64 << 20));
        let given = |names: &[(&str, &PathBuf)]| -> Vec<(String, PathBuf)> {
            names.iter().map(|(name, path)| (name.to_string(), path.to_path_buf())).collect()
        };
        let both = bind(&[disk("xvda"), disk("xvdb")], &given(&[("xvda", &root), ("private", &private)]));
        assert_eq!(
            both.unwrap(),
            Binding { root: root.clone(), private: Some(private.clone()), volatile: None }
        );
        assert!(bind(&[], &given(&[("root", &root)])).is_ok(), "a guest without disks gets some");

        let qcow2 = file("qcow2", 8192);
        File::options().write(true).open(&qcow2).unwrap().write_all_at(&QCOW2_MAGIC, 0).unwrap();
        type Case<'a> = (&'a [&'a str], &'a [(&'a str, &'a PathBuf)], &'a str);
        let cases: &[Case] = &[
            (&["xvda", "xvdb"], &[("root", &root)], "disk xvdb, which was /old/disk"),
            (&["xvdb"], &[("xvdb", &private)], "disk root, and a qube has one"),
            (&["xvda", "hda"], &[("root", &root)], "\"hda\""),
            (&["xvda"], &[("xvdd", &root)], "\"xvdd\""),
            (&["xvda"], &[("root", &root), ("xvda", &root)], "twice"),
            (&["xvda"], &[("root", &qcow2)], "qcow2"),
            (&["xvda"], &[("root", &file("empty", 0))], "is empty"),
            (&["xvda"], &[("root", &file("odd", 4097))], "whole number of pages"),
            (&["xvda"], &[("root", &root), ("private", &root)], "from 32 MiB"),
            (&["xvda"], &[("root", &folder.path().to_path_buf())], "no regular file"),
        ];
        for (vdevs, files, said) in cases {
            let disks: Vec<DiskConfig> = vdevs.iter().map(|vdev| disk(vdev)).collect();
            let error = bind(&disks, &given(files)).unwrap_err();
            assert!(error.to_string().contains(said), "{error}, not {said}");
            assert!(said == &"twice" || error.hint_text().is_some());
        }
    }
}
