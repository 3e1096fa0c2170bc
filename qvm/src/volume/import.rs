//! `qvm-volume import`. As with the stock client, data does not go over the API's socket: the service `admin.vm.volume.Import` of dom0 takes it, or
//! `ImportWithSize` behind a line with its size, which are `dispvmd import`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::process::Stdio;

use admin_api::Reply;

use super::Volume;
use crate::outcome::{Failure, Outcome};
use crate::programs;

pub fn run(volume: &Volume<'_>, path: &str, size: Option<u64>, no_resize: bool) -> Outcome<()> {
    let cannot = |error: io::Error| Failure::error(format!("cannot read {path}: {error}"));
    let (mut data, bytes): (Box<dyn Read>, u64) = match path {
        "-" => (Box::new(io::stdin().lock()), 0),
        path => {
            let file = File::open(path).map_err(cannot)?;
            let bytes = file.metadata().map_err(cannot)?.len();
            (Box::new(file), bytes)
        }
    };
    if path == "-" && size.is_none() && !no_resize {
        return Err(Failure::error("the size of standard input is not known: use --size or --no-resize"));
    }
    let mut command = programs::own(programs::DAEMON);
    command.arg("import");
    // Without a size, whatever comes is taken for all of it: also where we are killed half-way.
    let size = match (no_resize, path) {
        (true, "-") => None,
        (true, _) => Some(volume.size()?),
        (false, _) => Some(size.unwrap_or(bytes)),
    };
    if let Some(size) = size.filter(|_| no_resize) {
        if bytes > size {
            return Err(Failure::error(format!("{path} has {bytes} bytes, the volume {size}")));
        }
        data = Box::new(data.chain(io::repeat(0)).take(size));
    }
    command.args(size.map(|_| "--with-size"));
    let header = size.map_or(String::new(), |size| format!("{size}\n"));
    command
        .args(["--", volume.qube, volume.name])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| programs::not_started(&command, &error))?;
    let fed = child.stdin.take().map_or(Ok(()), |mut to| {
        to.write_all(header.as_bytes())?;
        let fed = io::copy(&mut data, &mut to).map(drop);
        // The end of a file that cannot be read is not the end of the data.
        fed.inspect_err(|_| drop(child.kill()))
    });
    let output = child.wait_with_output().map_err(|error| programs::not_started(&command, &error))?;
    match Reply::decode(&output.stdout) {
        Ok(Reply::Ok(_)) => fed.map_err(cannot),
        Ok(Reply::Exception(exception)) => Err(Failure::error(exception.message())),
        _ => Err(Failure::error("dispvmd does not answer: its log, or its standard error, says why")),
    }
}
