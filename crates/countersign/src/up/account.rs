//! Users of this machine, from its own tables.

/// First user of workloads that name none.
const FIRST_WORKLOAD_UID: u32 = 20_000;

/// A user and its groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// User.
    pub uid: u32,
    /// Main group.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
}

impl Account {
    /// A user of its own for the workload with this number.
    pub fn of_number(n: usize) -> Self {
        let id = FIRST_WORKLOAD_UID + u32::try_from(n).unwrap_or(0);
        Self { uid: id, gid: id, groups: vec![] }
    }

    /// Looks a user up by name or number.
    pub fn find(text: &str) -> Result<Self, String> {
        if let Ok(uid) = text.parse::<u32>() {
            return Ok(Self { uid, gid: uid, groups: vec![] });
        }
        let read = |path| std::fs::read_to_string(path).map_err(|e| format!("cannot read {path}: {e}"));
        Self::in_tables(text, &read("/etc/passwd")?, &read("/etc/group")?)
            .ok_or_else(|| format!("there is no user `{text}` in this machine's /etc/passwd"))
    }

    /// The user with this name, from the text of passwd(5) and group(5).
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
}
