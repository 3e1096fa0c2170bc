//! What the commands print: lines for people, one JSON object (or array) for programs.

use std::path::Path;

use control_plane::output::bytes_text;
use control_plane::savefiles::{Built, Collected, Description, Exported, Imported, Rebuild, Standing};
use serde_json::{json, Map, Value};

/// A DVM template in the list.
pub struct Row {
    /// Its name.
    pub name: String,
    /// Its savefile's generation.
    pub generation: Option<u64>,
    /// Its savefile's size.
    pub stored_bytes: Option<u64>,
    /// How it stands.
    pub standing: Standing,
}

/// What a build made, and how long each phase took.
pub fn print_built(dvm: &str, built: &Built, json: bool) {
    let written = &built.written;
    if json {
        let phases: Map<String, Value> =
            built.timeline.phases_ms().map(|(phase, ms)| (phase.to_owned(), json!(ms.round()))).collect();
        println!(
            "{}",
            json!({
                "name": dvm,
                "path": built.path,
                "generation": built.generation,
                "root_hash": written.root.to_string(),
                "stored_bytes": written.stored_bytes.0,
                "pages": written.pages.0,
                "zero_pages": written.zero_pages.0,
                "unique_pages": written.unique_pages.0,
                "phases_ms": phases,
            })
        );
        return;
    }
    println!("{dvm}: savefile generation {}, {}", built.generation, bytes_text(written.stored_bytes.0));
    for (phase, ms) in built.timeline.phases_ms() {
        println!("{phase:>12} {ms:8.0} ms");
    }
}

/// Everything known of a savefile.
pub fn print_info(description: &Description, json: bool) {
    let manifest = &description.manifest;
    if json {
        println!(
            "{}",
            json!({
                "name": description.name,
                "path": description.path,
                "generation": manifest.generation,
                "root_hash": description.root_hash,
                "memory_bytes": manifest.memory_bytes,
                "stored_bytes": description.stored_bytes,
                "working_set_bytes": manifest.working_set_bytes().0,
                "vcpus": manifest.vcpus,
                "created": manifest.created,
                "state": state_json(&description.standing),
                "template": manifest.template,
                "template_generation": manifest.template_generation,
                "host": manifest.host,
                "agent_version": manifest.agent_version,
                "volumes": manifest.volumes,
            })
        );
        return;
    }
    let line = |name: &str, value: String| println!("{name:12} {value}");
    line("name", description.name.clone());
    line("path", description.path.display().to_string());
    line("generation", manifest.generation.to_string());
    line("root hash", description.root_hash.clone());
    line("state", state_text(&description.standing));
    line("template", format!("{} generation {}", manifest.template, manifest.template_generation));
    line("memory", bytes_text(manifest.memory_bytes));
    line("vCPUs", manifest.vcpus.to_string());
    line("stored", bytes_text(description.stored_bytes));
    line("working set", bytes_text(manifest.working_set_bytes().0));
    let host = &manifest.host;
    line(
        "host",
        format!("{} {}, {}, {}, {}", host.kind, host.version, host.machine, host.cpu_model, host.accel),
    );
    line("agent", manifest.agent_version.clone());
    line("created", format!("{} (seconds since 1970)", manifest.created));
}

/// That a savefile is whole.
pub fn print_verified(dvm: &str, path: &Path, json: bool) {
    if json {
        println!("{}", json!({ "name": dvm, "path": path, "verified": true }));
    } else {
        println!("{dvm}: every byte of {} is as it was written", path.display());
    }
}

/// What an import has made, and what of the guest will not be as it was.
pub fn print_imported(dvm: &str, imported: &Imported, json: bool) {
    let (template, generation) = &imported.template;
    let (written, config) = (&imported.written, &imported.guest.config);
    if json {
        println!(
            "{}",
            json!({
                "name": dvm,
                "path": imported.path,
                "root_hash": written.root.to_string(),
                "template": template,
                "template_generation": generation,
                "guest": config.name,
                "memory_bytes": imported.guest.memory_bytes().0,
                "vcpus": config.vcpus,
                "stored_bytes": written.stored_bytes.0,
                "pages": written.pages.0,
                "zero_pages": written.zero_pages.0,
                "notes": imported.notes,
            })
        );
        return;
    }
    println!(
        "{dvm}: {} with {} and {} vCPUs, savefile of {}, on {template} generation {generation}",
        config.name,
        bytes_text(imported.guest.memory_bytes().0),
        config.vcpus,
        bytes_text(written.stored_bytes.0)
    );
    imported.notes.iter().for_each(|note| println!("Note: {note}"));
}

/// What an export has made.
pub fn print_exported(dvm: &str, exported: &Exported, json: bool) {
    if json {
        let disks: Map<String, Value> =
            exported.disks.iter().map(|(vdev, path)| (vdev.clone(), json!(path))).collect();
        println!(
            "{}",
            json!({ "name": dvm, "path": exported.file, "stored_bytes": exported.bytes, "disks": disks })
        );
        return;
    }
    println!("{dvm}: {}, {}", exported.file.display(), bytes_text(exported.bytes));
    exported.disks.iter().for_each(|(vdev, path)| println!("{vdev}: {}", path.display()));
    println!("Hint: `xl restore {}`", exported.file.display());
}

/// How a savefile stands.
pub fn print_status(dvm: &str, standing: &Standing, rebuild: &Rebuild, json: bool) {
    if json {
        let rebuilding = *rebuild == Rebuild::UnderWay;
        println!("{}", json!({ "name": dvm, "state": state_json(standing), "rebuilding": rebuilding }));
        return;
    }
    println!("{dvm}: {}", state_text(standing));
    if *standing == Standing::Fresh {
        return;
    }
    match rebuild {
        Rebuild::UnderWay => println!("a new savefile is being built"),
        Rebuild::Failed(last, log) => {
            println!(
                "the last rebuild failed: {last} (see {})\nHint: `dispvm-savefile build {dvm}`",
                log.display()
            );
        }
        Rebuild::Quiet => println!("Hint: `dispvm-savefile build {dvm}`"),
    }
}

/// All DVM templates.
pub fn print_list(rows: &[Row], json: bool) {
    if json {
        let rows: Vec<Value> = rows
            .iter()
            .map(|row| {
                json!({ "name": row.name, "generation": row.generation, "stored_bytes": row.stored_bytes,
                        "state": state_json(&row.standing) })
            })
            .collect();
        println!("{}", Value::from(rows));
        return;
    }
    for row in rows {
        let generation = row.generation.map_or("-".to_owned(), |generation| generation.to_string());
        let size = row.stored_bytes.map_or("-".to_owned(), bytes_text);
        println!("{:20} {generation:>6} {size:>10}  {}", row.name, state_text(&row.standing));
    }
}

/// What a collection removed.
pub fn print_collected(collected: &Collected, json: bool) {
    if json {
        println!(
            "{}",
            json!({ "savefiles": collected.savefiles, "hot_images": collected.hot_images,
                    "root_generations": collected.root_generations,
                    "private_generations": collected.private_generations })
        );
    } else {
        println!(
            "removed {} savefiles, {} hot images, {} template generations, {} generations of private volumes",
            collected.savefiles,
            collected.hot_images,
            collected.root_generations,
            collected.private_generations
        );
    }
}

fn state_text(standing: &Standing) -> String {
    match standing {
        Standing::Fresh => "fresh".to_owned(),
        Standing::Missing => "no savefile".to_owned(),
        Standing::Stale(why) => format!("stale: {}", why.join("; ")),
        Standing::Corrupt(why) => format!("corrupt: {why}"),
    }
}

fn state_json(standing: &Standing) -> Value {
    match standing {
        Standing::Fresh => json!({ "state": "fresh" }),
        Standing::Missing => json!({ "state": "missing" }),
        Standing::Stale(why) => json!({ "state": "stale", "why": why }),
        Standing::Corrupt(why) => json!({ "state": "corrupt", "why": [why] }),
    }
}
