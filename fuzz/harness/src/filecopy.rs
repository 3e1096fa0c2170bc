//! What another qube sends to qubes.Filecopy.

use std::fs;
use std::path::Path;

use filecopy::{receive, Characters, Limits, Reply, Tree};

/// Files live in memory.
const MEMORY: &str = "/dev/shm";
const LIMITS: Limits = Limits { entries: 64, bytes: 1 << 20 };

/// A transfer into an empty folder. Whatever comes is answered, nothing is made beside the folder, and no link leads out of it.
pub fn transfer(data: &[u8]) {
    let outside = tempfile::tempdir_in(MEMORY).expect("a folder in memory");
    let into = outside.path().join("into");
    fs::create_dir(&into).expect("a folder");
    let tree = Tree::open(&into).expect("it opens");
    let mut answer = Vec::new();
    let result = receive(data, &mut answer, &tree, Characters::Any, &LIMITS);
    let reply = Reply::read(&mut &answer[..]).expect("bytes can be read").expect("there is an answer");
    assert_eq!(reply.error == 0, result.is_ok());
    assert_eq!(fs::read_dir(outside.path()).expect("a folder").count(), 1);
    check(&into, &into);
}

fn check(folder: &Path, root: &Path) {
    // A sent mode may forbid it to who is not root.
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries {
        let path = entry.expect("an entry").path();
        let meta = fs::symlink_metadata(&path).expect("it is there");
        if meta.is_dir() {
            check(&path, root);
        } else if meta.is_symlink() {
            assert_ne!(folder, root);
            if let Ok(target) = path.canonicalize() {
                assert!(target.starts_with(root), "{}", path.display());
            }
        }
    }
}
