//! The one pool there is, the state folder, and its volumes by their names in it.

use super::answer::{enforce, silent, Answer};
use super::api::lines;
use super::settings;
use super::volumes::{self, POOL};
use super::world::World;
use crate::error::Error;
use admin_api::Request;

/// Answers `admin.pool.*`.
pub(super) fn answer(world: &World<'_>, what: &str, request: &Request) -> Answer<String> {
    match what {
        "List" => return Ok(lines([POOL])),
        "ListDrivers" => return Ok("file dir_path\n".to_owned()),
        _ => enforce(request.argument == POOL, "no such pool")?,
    }
    let (size, usage) = space(world)?;
    match what {
        "Info" => {
            let folder = world.state.root().display();
            let keep = settings::REVISIONS_TO_KEEP;
            let config = format!("dir_path={folder}\ndriver=file\nephemeral_volatile=True\nname={POOL}\n");
            Ok(format!("{config}revisions_to_keep={keep}\nsize={size}\nusage={usage}\n"))
        }
        "UsageDetails" => Ok(format!("data_size={size}\ndata_usage={usage}\n")),
        "volume.List" => list(world),
        "volume.Info" | "volume.ListSnapshots" => {
            let vid = std::str::from_utf8(&request.payload).ok().and_then(|vid| vid.split_once('/'));
            let (qube, volume) = vid.ok_or_else(|| silent("no volume's name"))?;
            let vm = world.find(qube)?.ok_or_else(|| silent("no such volume"))?;
            match what {
                "volume.Info" => volumes::info(world, &vm, volume),
                _ => volumes::revisions(world, &vm, volume),
            }
        }
        _ => Err(silent("no such method")),
    }
}

fn list(world: &World<'_>) -> Answer<String> {
    let mut all = Vec::new();
    for vm in world.all()? {
        all.extend(volumes::names(&vm).iter().map(|name| volumes::vid(&vm.name, name)));
    }
    Ok(lines(all))
}

/// Bytes of the file system that the state folder is on: all there are, and those in use.
fn space(world: &World<'_>) -> Answer<(u64, u64)> {
    let folder = world.state.root();
    let space = rustix::fs::statvfs(folder)
        .map_err(|error| Error::io("ask for the space of", folder)(error.into()))?;
    let bytes = |blocks: u64| blocks.saturating_mul(space.f_frsize);
    Ok((bytes(space.f_blocks), bytes(space.f_blocks.saturating_sub(space.f_bfree))))
}
