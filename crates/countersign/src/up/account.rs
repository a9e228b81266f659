//! Users of this machine from its own tables, and what a program learns about its user.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The machine's tables of users and groups (passwd(5), group(5)).
const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// The ID that no user and no group can have: system calls take it for "leave as it is" (setresuid(2)).
const NOBODY_AT_ALL: u32 = u32::MAX;

/// A user and its groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// User ID of the account.
    pub uid: u32,
    /// Primary group ID.
    pub gid: u32,
    /// Supplementary group IDs.
    pub groups: Vec<u32>,
}

/// A user as programs see it: name, home folder and shell of passwd(5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// Login name of the user.
    pub name: String,
    /// Home folder of the user.
    pub home: PathBuf,
    /// Path of the login shell.
    pub shell: PathBuf,
    /// Whether the machine's table contains the user.
    pub known: bool,
}

impl Account {
    /// The user with this ID, in a group with the same ID.
    pub fn of_uid(uid: u32) -> Self {
        Self { uid, gid: uid, groups: vec![] }
    }

    /// Looks a user up by name or ID. An ID that is in no table is valid too, except the one that stands for no user.
    pub fn find(text: &str) -> Result<Self, String> {
        let passwd = read(PASSWD)?;
        let name = match text.parse::<u32>() {
            Ok(NOBODY_AT_ALL) => {
                return Err(format!("{NOBODY_AT_ALL} is no user ID: the kernel takes it for \"no change\""));
            }
            Ok(uid) => match Login::in_table(uid, &passwd) {
                Some(login) => login.name,
                None => return Ok(Self::of_uid(uid)),
            },
            Err(_) => text.to_owned(),
        };
        Self::in_tables(&name, &passwd, &read(GROUP)?)
            .ok_or_else(|| format!("there is no user `{text}` in this machine's {PASSWD}"))
    }

    /// The user with this name, from the texts of passwd(5) and group(5).
    fn in_tables(name: &str, passwd: &str, group: &str) -> Option<Self> {
        let (uid, gid) = passwd.lines().find_map(|line| match line.split(':').collect::<Vec<_>>()[..] {
            [n, _, uid, gid, ..] if n == name => Some((uid.parse().ok()?, gid.parse().ok()?)),
            _ => None,
        })?;
        let member_of = |line: &str| match line.split(':').collect::<Vec<_>>()[..] {
            [_, _, id, members] if members.split(',').any(|m| m == name) => id.parse::<u32>().ok(),
            _ => None,
        };
        let mut groups = vec![gid];
        groups.extend(group.lines().filter_map(member_of).filter(|id| *id != gid));
        Some(Self { uid, gid, groups })
    }
}

impl Login {
    /// The user from the machine's table; if it is missing there, a user with the workload's name and this home folder.
    pub fn of(account: &Account, workload: &str, home: &Path) -> Result<Self, String> {
        let passwd = read(PASSWD)?;
        Ok(Self::in_table(account.uid, &passwd).unwrap_or_else(|| Self {
            name: free_name(workload, &passwd),
            home: home.to_owned(),
            shell: "/bin/sh".into(),
            known: false,
        }))
    }

    fn in_table(uid: u32, passwd: &str) -> Option<Self> {
        passwd.lines().find_map(|line| match line.split(':').collect::<Vec<_>>()[..] {
            [name, _, id, _, _, home, shell] if id.parse::<u32>() == Ok(uid) => Some(Self {
                name: name.into(),
                home: if home.is_empty() { "/" } else { home }.into(),
                shell: if shell.is_empty() { "/bin/sh" } else { shell }.into(),
                known: true,
            }),
            _ => None,
        })
    }

    /// Environment variables that login(1) would set.
    pub fn environment(&self) -> [(String, String); 4] {
        let shown = |path: &Path| path.display().to_string();
        [
            ("HOME".into(), shown(&self.home)),
            ("USER".into(), self.name.clone()),
            ("LOGNAME".into(), self.name.clone()),
            ("SHELL".into(), shown(&self.shell)),
        ]
    }

    /// Writes copies of the machine's tables with this user added to a folder, to be mounted over them for its program:
    /// ssh, git and psql look their user up and fail without an entry. `None` if the machine's own tables suffice.
    pub fn write_tables(&self, account: &Account, folder: &Path) -> io::Result<Option<PathBuf>> {
        if self.known || !Path::new(PASSWD).is_file() || !Path::new(GROUP).is_file() {
            return Ok(None);
        }
        let Self { name, home, shell, .. } = self;
        let Account { uid, gid, .. } = account;
        std::fs::create_dir_all(folder)?;
        let write = |from: &str, line: String| {
            let mut text = std::fs::read_to_string(from)?;
            if !text.is_empty() && !text.ends_with('\n') {
                text.push('\n');
            }
            let to = folder.join(Path::new(from).file_name().unwrap_or_default());
            std::fs::write(&to, text + &line)?;
            std::fs::set_permissions(&to, PermissionsExt::from_mode(0o644))
        };
        write(PASSWD, format!("{name}:x:{uid}:{gid}:workload of a mesh:{}:{}\n", home.display(), shell.display()))?;
        let taken = read(GROUP).map_err(io::Error::other)?;
        let has_group = taken.lines().any(|l| l.split(':').nth(2).is_some_and(|id| id.parse::<u32>() == Ok(*gid)));
        write(GROUP, if has_group { String::new() } else { format!("{}:x:{gid}:\n", free_name(name, &taken)) })?;
        Ok(Some(folder.to_owned()))
    }
}

/// User IDs in the machine's table; empty if there is no table.
pub fn known_uids() -> Vec<u32> {
    let passwd = read(PASSWD).unwrap_or_default();
    passwd.lines().filter_map(|line| line.split(':').nth(2)?.parse().ok()).collect()
}

/// A name that is not in a table: `wanted`, or one derived from it.
fn free_name(wanted: &str, table: &str) -> String {
    let taken = |name: &str| table.lines().any(|l| l.split(':').next() == Some(name));
    if taken(wanted) { format!("mesh-{wanted}") } else { wanted.to_owned() }
}

fn read(path: &str) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|e| format!("cannot read {path}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_its_main_group_and_those_that_list_it() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/:\nhalf:x:no\nbroken\n";
        let group = "root:x:0:\nweb:x:34:web\nlogs:x:40:bob,web\nother:x:41:webmaster\nbroken\n";
        let web = Account::in_tables("web", passwd, group).unwrap();
        assert_eq!(web, Account { uid: 33, gid: 34, groups: vec![34, 40] });
        assert_eq!(Account::in_tables("half", passwd, group), None);
        assert_eq!(Account::in_tables("nobody", passwd, group), None);
    }

    #[test]
    fn the_id_that_stands_for_no_user_is_refused() {
        assert!(Account::find("4294967295").unwrap_err().starts_with("4294967295 is no user ID"));
        assert_eq!(Account::find("4294967294").unwrap(), Account::of_uid(4_294_967_294));
    }

    #[test]
    fn a_user_that_the_table_lacks_is_named_for_its_workload() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nmail:x:8:8:::\n";
        let known = Login::in_table(8, passwd).unwrap();
        assert_eq!((known.home, known.shell), (PathBuf::from("/"), PathBuf::from("/bin/sh")));
        assert_eq!(Login::in_table(9, passwd), None);
        assert_eq!(free_name("web", passwd), "web");
        assert_eq!(free_name("mail", passwd), "mesh-mail", "a workload does not become the machine's user by its name");
    }
}
