//! The nodes of the simulated xenstored, and what is done with them.

use std::collections::BTreeMap;

use nix::errno::Errno;

use crate::xenstore::wire::{strings, words, Access, Op, Perm};

/// All nodes by path; the root is `/`.
pub(super) type Tree = BTreeMap<String, Stored>;

/// A node.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) value: Vec<u8>,
    pub(super) perms: Vec<Perm>,
}

/// A path that changed, and whether all below it went with it.
#[derive(Clone, Debug)]
pub(super) struct Touched {
    pub(super) path: String,
    pub(super) removed: bool,
}

/// Does what was asked with nodes; answers the reply and what changed.
pub(super) fn operate(
    tree: &mut Tree,
    domid: u16,
    op: Op,
    path: &str,
    rest: &[u8],
) -> Result<(Vec<u8>, Vec<Touched>), Errno> {
    let changed = |removed| vec![Touched { path: path.to_owned(), removed }];
    let node = tree.get(path);
    let may = |wanted: Access| match node.or_else(|| nearest(tree, path)) {
        Some(node) if allows(&node.perms, domid, wanted) => Ok(()),
        _ => Err(Errno::EACCES),
    };
    match op {
        Op::Read => {
            may(Access::Read)?;
            Ok((node.ok_or(Errno::ENOENT)?.value.clone(), Vec::new()))
        }
        Op::GetPerms => {
            may(Access::Read)?;
            let perms: Vec<String> = node.ok_or(Errno::ENOENT)?.perms.iter().map(Perm::to_string).collect();
            Ok((words(perms.iter().map(String::as_str)).map_err(|_| Errno::E2BIG)?, Vec::new()))
        }
        Op::Directory => {
            may(Access::Read)?;
            node.ok_or(Errno::ENOENT)?;
            let names = tree.keys().filter_map(|known| child_of(known, path));
            Ok((words(names).map_err(|_| Errno::E2BIG)?, Vec::new()))
        }
        Op::Mkdir if node.is_some() => Ok((b"OK\0".to_vec(), Vec::new())),
        Op::Write | Op::Mkdir => {
            may(Access::Write)?;
            put(tree, path, (op == Op::Write).then_some(rest), domid);
            Ok((b"OK\0".to_vec(), changed(false)))
        }
        Op::Rm if node.is_none() => match tree.contains_key(parent(path)) {
            true => Ok((b"OK\0".to_vec(), Vec::new())),
            false => Err(Errno::ENOENT),
        },
        Op::Rm => {
            may(Access::Write)?;
            tree.retain(|known, _| !is_below(known, path));
            Ok((b"OK\0".to_vec(), changed(true)))
        }
        Op::SetPerms => {
            let owner = node.ok_or(Errno::ENOENT)?.perms.first().map(|perm| perm.domid);
            let list = strings(rest).map_err(|_| Errno::EINVAL)?;
            let perms: Result<Vec<Perm>, _> = list.iter().map(|perm| Perm::parse(perm)).collect();
            let perms = perms.map_err(|_| Errno::EINVAL)?;
            match perms.first() {
                Some(first) if domid == 0 || Some(first.domid) == owner && owner == Some(domid) => {}
                _ => return Err(Errno::EACCES),
            }
            if let Some(node) = tree.get_mut(path) {
                node.perms = perms;
            }
            Ok((b"OK\0".to_vec(), changed(false)))
        }
        _ => Err(Errno::ENOSYS),
    }
}

/// Writes or makes a node and those above it, which inherit their parent's permissions.
pub(super) fn put(tree: &mut Tree, path: &str, value: Option<&[u8]>, domid: u16) {
    if !tree.contains_key(path) {
        if path != "/" {
            put(tree, parent(path), None, domid);
        }
        let mut perms = tree.get(parent(path)).map(|node| node.perms.clone()).unwrap_or_default();
        if let (Some(owner), true) = (perms.first_mut(), domid != 0) {
            owner.domid = domid;
        }
        tree.insert(path.to_owned(), Stored { value: Vec::new(), perms });
    }
    if let (Some(node), Some(value)) = (tree.get_mut(path), value) {
        node.value = value.to_vec();
    }
}

fn allows(perms: &[Perm], domid: u16, wanted: Access) -> bool {
    let Some(owner) = perms.first() else { return false };
    let entry = perms.iter().skip(1).find(|perm| perm.domid == domid).unwrap_or(owner);
    domid == 0 || owner.domid == domid || entry.access == wanted || entry.access == Access::Both
}

fn nearest<'a>(tree: &'a Tree, path: &str) -> Option<&'a Stored> {
    tree.get(parent(path)).or_else(|| if path == "/" { None } else { nearest(tree, parent(path)) })
}

fn parent(path: &str) -> &str {
    match path.rsplit_once('/') {
        Some(("", _)) | None => "/",
        Some((parent, _)) => parent,
    }
}

fn child_of<'a>(path: &'a str, of: &str) -> Option<&'a str> {
    let name = path.strip_prefix(if of == "/" { "" } else { of })?.strip_prefix('/')?;
    (!name.is_empty() && !name.contains('/')).then_some(name)
}

pub(super) fn is_below(path: &str, of: &str) -> bool {
    path == of || of == "/" || path.strip_prefix(of).is_some_and(|rest| rest.starts_with('/'))
}
