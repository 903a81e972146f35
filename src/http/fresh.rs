//! Files that may change while the front runs: certificates, keys.

use super::error::ServeError;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Asks a front to read its files again at once. Cheap to clone; all clones are one bell.
#[derive(Debug, Clone, Default)]
pub struct Reread(Arc<watch::Sender<u64>>);

impl Reread {
    /// Rings.
    pub fn now(&self) {
        self.0.send_modify(|rings| *rings += 1);
    }
}

/// What tells that a file is another one.
type Stamp = Option<(SystemTime, u64, u64)>;

fn stamp(path: &Path) -> Stamp {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.modified().ok()?, meta.len(), meta.ino()))
}

/// Has `read` called when one of `files` has changed, or when it is asked for, until `stop`. What cannot be read changes
/// nothing and is in the log; it is tried again each time, because half of a pair may have been written.
pub(super) async fn watch(
    files: Vec<PathBuf>,
    look_every: Duration,
    reread: Reread,
    stop: CancellationToken,
    mut read: impl FnMut() -> Result<(), ServeError>,
) {
    let stamps = || files.iter().map(|file| stamp(file)).collect::<Vec<_>>();
    let mut seen = stamps();
    let mut asked = reread.0.subscribe();
    let mut ticks = tokio::time::interval(look_every);
    loop {
        let is_asked = tokio::select! {
            () = stop.cancelled() => return,
            // The bell cannot be gone: `reread` is here.
            _ = asked.changed() => true,
            _ = ticks.tick() => false,
        };
        let now = stamps();
        if now == seen && !is_asked {
            continue;
        }
        match read() {
            Ok(()) => {
                seen = now;
                tracing::info!(?files, "read again");
            }
            Err(error) => tracing::warn!(%error, "not taken over; what was read before stays in use"),
        }
    }
}
