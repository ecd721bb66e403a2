//! A log says what was written, whatever pieces it came in.

use jiff::Timestamp;
use node::logs::{Stream, Wanted, Writer};
use proptest::prelude::*;

proptest! {
    #[test]
    fn what_was_written_is_read_and_a_tail_is_its_end(
        lines in prop::collection::vec("[a-z ]{0,30}", 0..40),
        cuts in prop::collection::vec(1usize..50, 1..40),
        tail in 0usize..50,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        let mut writer = Writer::create(path.clone()).unwrap();
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let mut rest = text.as_bytes();
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (piece, after) = rest.split_at((*cut).min(rest.len()));
            writer.write(Stream::Out, piece, Timestamp::now()).unwrap();
            rest = after;
        }
        writer.write(Stream::Err, b"begun", Timestamp::now()).unwrap();
        writer.finish(Stream::Err, Timestamp::now()).unwrap();
        let log = std::fs::read(path).unwrap_or_default();
        let out = Wanted { stream: Some(Stream::Out), ..Wanted::default() };
        prop_assert_eq!(String::from_utf8(out.render(&log)).unwrap(), text.clone());
        let last = Wanted { tail: Some(tail), ..out };
        let wanted: String =
            lines.iter().skip(lines.len().saturating_sub(tail)).map(|l| format!("{l}\n")).collect();
        prop_assert_eq!(String::from_utf8(last.render(&log)).unwrap(), wanted);
        let all = String::from_utf8(Wanted::default().render(&log)).unwrap();
        prop_assert_eq!(all, format!("{text}begun"));
    }
}

#[test]
fn what_was_said_before_is_left_out_and_damage_costs_its_line_only() {
    let log = b"2026-01-01T00:00:00.000000001Z stdout F early\n\
        garbage\n\
        2026-01-02T00:00:00Z stderr P long \n\
        2026-01-02T00:00:00Z stderr F line\n\
        2026-01-03T00:00:00Z stdout F last\n";
    let since = Some("2026-01-02T00:00:00Z".parse().unwrap());
    let wanted = Wanted { since, timestamps: true, ..Wanted::default() };
    let text = String::from_utf8(wanted.render(log)).unwrap();
    assert_eq!(
        text,
        "2026-01-02T00:00:00.000000000Z long line\n2026-01-03T00:00:00.000000000Z last\n"
    );
    let two = Wanted { tail: Some(2), ..Wanted::default() };
    assert_eq!(two.render(log), b"long line\nlast\n");
}
