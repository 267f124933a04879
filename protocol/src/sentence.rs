//! What a process says to another, or to a user, about an error: one sentence.

/// An error and its causes in one sentence.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // A transparent error repeats its cause word by word.
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// Text of a stranger's making as one line of `most` characters at most, without any that controls a terminal.
pub fn one_line(text: &str, most: usize) -> String {
    let one_line = text.trim().chars().map(|c| if c.is_whitespace() { ' ' } else { c });
    one_line.filter(|c| !c.is_control()).take(most).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stranger_can_not_drive_the_terminal_nor_fill_it() {
        assert_eq!(one_line(" a\x1b[2Jb\r\nc\u{9b} ", 100), "a[2Jb  c");
        assert_eq!(one_line(&"x".repeat(5000), 1000).len(), 1000);
    }
}
