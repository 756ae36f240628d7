//! Follows a local file.

use std::path::PathBuf;
use std::time::Duration;

use mesh_runtime::tasks::Draining;
use tokio::time::MissedTickBehavior;

use super::load::{Handlers, LoadError, Loaded, Source, Stamp};

/// How often the file is looked at. A look is one `stat`. By name, so that a link that is turned elsewhere, which
/// is how Kubernetes replaces a mounted file, is seen too.
const LOOK: Duration = Duration::from_millis(250);

/// Reloads a file whenever it has changed and was then left alone for one look, until told to stop.
///
/// A file that is missing or has a fault is logged once and changes nothing.
pub async fn watch<H: Handlers + 'static>(
    path: PathBuf,
    loaded: Loaded,
    handlers: H,
    draining: Draining,
) {
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen = Some(loaded.stamp);
    let mut last = loaded.stamp;
    let mut both = Some((loaded, handlers));
    loop {
        tokio::select! {
            () = draining.stopping() => return,
            _ = looks.tick() => {}
        }
        let now = match Stamp::of(&path) {
            Ok(stamp) => Some(stamp),
            Err(error) => {
                if last.is_some() {
                    tracing::warn!(path = %path.display(), %error, "local file is gone; keeping what it said");
                }
                last = None;
                continue;
            }
        };
        let settled = std::mem::replace(&mut last, now) == now;
        if !settled || seen == Some(now) {
            continue;
        }
        seen = Some(now);
        let Some((loaded, handlers)) = both.take() else { return };
        let source = Source::Path(path.clone());
        // Seconds of work for a large mesh: not on the thread that runs everything else.
        let work = tokio::task::spawn_blocking(move || reload(&source, loaded, handlers));
        match work.await {
            Ok((loaded, handlers, again)) => {
                if again {
                    seen = None;
                }
                both = Some((loaded, handlers));
            }
            Err(error) => {
                tracing::error!(%error, "the local file is no longer followed");
                return;
            }
        }
    }
}

fn reload<H: Handlers>(source: &Source, mut loaded: Loaded, mut handlers: H) -> (Loaded, H, bool) {
    let mut again = false;
    match loaded.reload(source, &mut handlers) {
        Ok((report, rejected)) => {
            for (line, rejected) in rejected {
                tracing::warn!(line, name = %rejected.name, reason = %rejected.reason,
                    "resource of the local file rejected; keeping its last good version");
            }
            tracing::info!(
                addresses = report.addresses,
                policies = report.policies,
                changed = report.changed,
                removed = report.removed,
                rejected = report.rejected,
                "local file reloaded"
            );
        }
        Err(error @ LoadError::Changed { .. }) => {
            tracing::info!(%error, "reading it again");
            again = true;
        }
        Err(error) => {
            let cause =
                std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            tracing::error!(%error, %cause, "local file not reloaded; keeping its last good state");
        }
    }
    (loaded, handlers, again)
}
