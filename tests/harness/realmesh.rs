//! The real mesh (`tests/realmesh`): where its scripts and its programs are.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

/// What tells the folder: the script that builds the programs.
const BUILD: &str = "scripts/build";

/// `tests/realmesh` of the checkout that this process runs in, not of the one that it was built in.
pub fn folder() -> Result<PathBuf> {
    let current = env::current_dir().context("there is no current folder")?;
    in_or_above(&current).with_context(|| {
        format!(
            "no tests/realmesh in {} or above it: its scripts are part of the checkout, so run it in there",
            current.display()
        )
    })
}

fn in_or_above(folder: &Path) -> Option<PathBuf> {
    let mut folders = folder.ancestors().map(|folder| folder.join("tests/realmesh"));
    folders.find(|folder| folder.join(BUILD).is_file())
}

/// Where the programs are built: `REALMESH_BIN`, or else in the cache, as [`BUILD`] has it.
#[must_use]
pub fn programs() -> PathBuf {
    let theirs =
        env::vars_os().find(|(key, _)| key == "REALMESH_BIN").map(|(_, value)| value.into());
    theirs.unwrap_or_else(|| {
        let home = env::home_dir().unwrap_or_default();
        home.join(".cache/ambient-mesh/realmesh/bin")
    })
}

/// One of the programs.
pub fn program(name: &str) -> Result<PathBuf> {
    let program = programs().join(name);
    ensure!(
        program.exists(),
        "no {}: build it by tests/realmesh/{BUILD}, which takes Go 1.26 or newer",
        program.display()
    );
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checkout_is_the_one_that_it_is_run_in() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let expected = Some(here.join("realmesh"));
        assert_eq!(in_or_above(here), expected);
        assert_eq!(in_or_above(&here.join("lab/checks")), expected);
        assert_eq!(in_or_above(Path::new("/")), None);
    }
}
