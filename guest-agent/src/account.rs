//! Users, from /etc/passwd and /etc/group. Read by hand: a static binary can't load the C library's name service.

use std::fs;
use std::path::Path;

/// A user as commands need to know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Login name.
    pub name: String,
    /// User number.
    pub uid: u32,
    /// Main group.
    pub gid: u32,
    /// All groups, the main one included.
    pub groups: Vec<u32>,
    /// Home folder.
    pub home: String,
    /// Login shell.
    pub shell: String,
}

impl Account {
    /// The user with this number; one without an entry gets a bare account.
    pub fn of(uid: u32, etc: &Path) -> Self {
        let passwd = fs::read_to_string(etc.join("passwd")).unwrap_or_default();
        let mut account =
            passwd.lines().find_map(|line| parse_passwd(line, uid)).unwrap_or_else(|| bare(uid));
        let groups = fs::read_to_string(etc.join("group")).unwrap_or_default();
        account.groups.extend(groups.lines().filter_map(|line| parse_member(line, &account.name)));
        account.groups.sort_unstable();
        account.groups.dedup();
        account
    }

    /// The variables a login sets.
    pub fn login_env(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        let variables = [
            ("PATH", PATH),
            ("HOME", &self.home),
            ("USER", &self.name),
            ("LOGNAME", &self.name),
            ("SHELL", &self.shell),
        ];
        variables.into_iter().map(|(key, value)| (key.into(), value.into())).collect()
    }
}

fn bare(uid: u32) -> Account {
    let (name, home) = if uid == 0 { ("root".into(), "/root".into()) } else { (uid.to_string(), "/".into()) };
    Account { name, uid, gid: uid, groups: vec![uid], home, shell: "/bin/sh".into() }
}

/// `name:password:uid:gid:comment:home:shell`
fn parse_passwd(line: &str, uid: u32) -> Option<Account> {
    let mut fields = line.split(':');
    let name = fields.next()?.to_string();
    if fields.nth(1)?.parse() != Ok(uid) {
        return None;
    }
    let gid = fields.next()?.parse().ok()?;
    let home = fields.nth(1)?.to_string();
    let shell = fields.next().filter(|shell| !shell.is_empty()).unwrap_or("/bin/sh").to_string();
    Some(Account { name, uid, gid, groups: vec![gid], home, shell })
}

/// `name:password:gid:member,member`
fn parse_member(line: &str, name: &str) -> Option<u32> {
    let mut fields = line.split(':').skip(2);
    let gid = fields.next()?.parse().ok()?;
    fields.next()?.split(',').any(|member| member == name).then_some(gid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_come_from_the_files() {
        let etc = tempfile::tempdir().expect("tempdir");
        let passwd = "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000:,,,:/home/user:\nbroken:x\n";
        fs::write(etc.path().join("passwd"), passwd).expect("write");
        fs::write(etc.path().join("group"), "sudo:x:27:user\naudio:x:29:pulse,user\nother:x:30:users\n")
            .expect("write");
        let user = Account::of(1000, etc.path());
        assert_eq!((user.name.as_str(), user.gid, user.home.as_str()), ("user", 1000, "/home/user"));
        assert_eq!(user.groups, [27, 29, 1000]);
        assert_eq!(user.shell, "/bin/sh");
        assert_eq!(Account::of(5, etc.path()).home, "/");
        assert_eq!(Account::of(0, etc.path()).shell, "/bin/bash");
    }
}
