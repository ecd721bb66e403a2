//! `oracle serve` in the guest, `oracle verify-image` on the host.

use std::process::ExitCode;

use oracle::image;
use oracle::protocol::{Arguments, Range, Report};
use oracle::serve::serve;

const USAGE: &str = "usage:
  oracle serve
      in the guest: commands on standard input, reports on standard output
  oracle verify-image FILE offset=N len=N seed=N acked=N [block=4096]
      on the host, while no guest runs: is every acknowledged write in the raw
      image FILE? Prints LOST lines and one VERIFY line; ends with 1 if any is lost";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.split_first() {
        Some((verb, [])) if verb == "serve" => {
            serve(&mut std::io::stdin().lock(), std::io::stdout())
                .map(|()| ExitCode::SUCCESS)
                .map_err(|error| format!("cannot read commands: {error}"))
        }
        Some((verb, [file, rest @ ..])) if verb == "verify-image" => {
            verify_image(file, &rest.join(" "))
        }
        _ => Err(USAGE.to_owned()),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("{error}");
        ExitCode::from(2)
    })
}

fn verify_image(file: &str, rest: &str) -> Result<ExitCode, String> {
    let (range, block, seed, acked) =
        image_arguments(file, rest).map_err(|error| format!("{error}\n{USAGE}"))?;
    let sums = image::verify(&range, block, seed, acked, |loss| {
        let image::Loss { slot, expected, found } = loss;
        println!("{}", Report::LostWrite { slot, expected, found });
    })
    .map_err(|error| match std::error::Error::source(&error) {
        Some(source) => format!("{error} ({source})"),
        None => error.to_string(),
    })?;
    let image::Comparison { slots, lost, newest } = sums;
    println!("VERIFY acked={acked} slots={slots} lost={lost} newest={newest}");
    Ok(ExitCode::from(u8::from(lost > 0)))
}

fn image_arguments(
    file: &str,
    rest: &str,
) -> Result<(Range, u64, u64, u64), oracle::protocol::Error> {
    let mut arguments = Arguments::split(rest);
    let range = Range {
        dev: file.to_owned(),
        offset: arguments.number("offset", None)?,
        len: arguments.number("len", None)?,
    };
    let block = arguments.number("block", Some(4096))?;
    let seed = arguments.number("seed", None)?;
    let acked = arguments.number("acked", None)?;
    arguments.none_left()?;
    Ok((range, block, seed, acked))
}
