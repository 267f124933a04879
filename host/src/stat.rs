//! What the kernel says of a process or a thread in one line (proc(5), `/proc/pid/stat`).

/// Such a line. Its second field, the name, may hold spaces and brackets, so it ends at the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat<'a> {
    /// Its second field, without the brackets.
    pub name: &'a str,
    fields: &'a str,
}

impl<'a> Stat<'a> {
    /// `None` for what is no such line.
    pub fn parse(line: &'a str) -> Option<Self> {
        let (before, fields) = line.rsplit_once(')')?;
        let (_, name) = before.split_once('(')?;
        Some(Self { name, fields })
    }

    /// A field by its number there, from 3 (the state) on.
    pub fn field(&self, number: usize) -> Option<&'a str> {
        self.fields.split_ascii_whitespace().nth(number.checked_sub(3)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_from_behind_the_name_whatever_it_holds() {
        let stat = Stat::parse("811 (vcpu) 0 (x) S 1 811").unwrap();
        assert_eq!(stat.name, "vcpu) 0 (x");
        assert_eq!([stat.field(3), stat.field(5), stat.field(6)], [Some("S"), Some("811"), None]);
        assert_eq!(stat.field(2), None, "it is the name");
        assert_eq!(Stat::parse("No such process"), None);
    }
}
