//! What a process needs to speak with others: who it is, and whom it believes. Both change.

use super::{Error, Identity, Trust, files};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::watch;

const TRUST: &str = "trust.pem";

/// Who a process is, and whom it believes.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// Who it is.
    pub identity: Identity,
    /// Whom it believes.
    pub trust: Trust,
    bundle: String,
}

impl Credentials {
    /// Of a bundle of CA certificates, PEM.
    ///
    /// # Errors
    /// When the bundle is none.
    pub fn new(identity: Identity, bundle: &str) -> Result<Self, Error> {
        let mut trust = Trust::new();
        trust.add_pem(bundle)?;
        Ok(Self { identity, trust, bundle: bundle.into() })
    }

    /// The bundle of CA certificates, PEM.
    pub fn bundle(&self) -> &str {
        &self.bundle
    }

    /// Writes `trust.pem`, `tls.key` and `tls.crt` into a folder.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        // N.B. first: who believes more than it needs to is never cut off.
        files::write(dir, TRUST, self.bundle.as_bytes())?;
        self.identity.save(dir)
    }

    /// Reads what [`Credentials::save`] wrote.
    ///
    /// # Errors
    /// When one is missing, or not what it should be.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let bundle = files::read_text(&dir.join(TRUST), false)?;
        Self::new(Identity::load(dir)?, &bundle)
    }

    /// Becomes others; returns whether they are others.
    pub fn replace(&mut self, with: Self) -> bool {
        let news = self.bundle != with.bundle || !self.identity.is(&with.identity);
        if news {
            *self = with;
        }
        news
    }

    /// Keeps a folder as [`Credentials::save`] writes it, whenever they change. Ends with their
    /// sender.
    pub async fn keep(mut those: watch::Receiver<Self>, dir: PathBuf, period: Duration) {
        while those.changed().await.is_ok() {
            loop {
                let credentials = those.borrow_and_update().clone();
                let Err(error) = credentials.save(&dir) else { break };
                tracing::warn!(dir = %dir.display(), %error, "credentials are not renewed");
                tokio::time::sleep(period).await;
            }
        }
    }

    /// Reads them, and reads them again whenever their files have changed. Ends with the last
    /// receiver.
    ///
    /// # Errors
    /// As [`Credentials::load`]. Later what cannot be read is tried again, and told in the log.
    pub fn follow(dir: &Path, period: Duration) -> Result<watch::Receiver<Self>, Error> {
        let (sender, receiver) = watch::channel(Self::load(dir)?);
        let dir = dir.to_owned();
        tokio::spawn(async move {
            let mut failures = 0_u32;
            while !sender.is_closed() {
                tokio::time::sleep(period).await;
                match Self::load(&dir) {
                    Ok(found) => {
                        failures = 0;
                        if sender.send_if_modified(|known| known.replace(found)) {
                            tracing::info!(dir = %dir.display(), "renewed credentials are in use");
                        }
                    }
                    Err(error) => {
                        failures = failures.saturating_add(1);
                        // The first may be in the midst of their being written.
                        if failures == 2 {
                            tracing::warn!(dir = %dir.display(), %error, "credentials are not renewed");
                        }
                    }
                }
            }
        });
        Ok(receiver)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::identity::{Ca, Role, SpiffeId};

    #[tokio::test]
    async fn renewed_files_are_taken_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::create("c").unwrap();
        let id = SpiffeId::new("c", Role::Handler, "n").unwrap();
        let made = || {
            let identity = ca.issue(&id, Duration::from_secs(60)).unwrap();
            Credentials::new(identity, ca.certificate_pem()).unwrap()
        };
        let (first, second) = (made(), made());
        first.save(dir.path()).unwrap();
        let period = Duration::from_millis(5);
        let mut followed = Credentials::follow(dir.path(), period).unwrap();
        assert!(followed.borrow().identity.is(&first.identity));
        // The new key is there, and its certificate is not yet.
        let other = tempfile::tempdir().unwrap();
        second.save(other.path()).unwrap();
        std::fs::copy(other.path().join("tls.key"), dir.path().join("tls.key")).unwrap();
        assert!(Credentials::load(dir.path()).is_err());
        tokio::time::sleep(period * 10).await;
        assert!(!followed.has_changed().unwrap());
        std::fs::copy(other.path().join("tls.crt"), dir.path().join("tls.crt")).unwrap();
        followed.changed().await.unwrap();
        assert!(followed.borrow().identity.is(&second.identity));
    }
}
