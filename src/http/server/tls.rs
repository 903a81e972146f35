//! TLS by rustls, with certificate and key that may change while the front runs.

use super::super::error::ServeError;
use super::super::fresh::{self, Reread};
use super::super::settings::TlsFiles;
use arc_swap::ArcSwap;
use std::path::Path;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ServerConfig, crypto};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::CancellationToken;

/// The certificate in use. Cheap to clone.
#[derive(Clone)]
pub(super) struct Tls {
    files: TlsFiles,
    config: Arc<ArcSwap<ServerConfig>>,
}

impl Tls {
    /// Reads certificate and key.
    pub(super) fn open(files: TlsFiles) -> Result<Self, ServeError> {
        let config = Arc::new(ArcSwap::from(read(&files)?));
        Ok(Self { files, config })
    }

    pub(super) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(&self, io: S) -> std::io::Result<TlsStream<S>> {
        TlsAcceptor::from(self.config.load_full()).accept(io).await
    }

    /// Takes over what the files hold when they change. What cannot be used changes nothing.
    pub(super) async fn watch(self, reread: Reread, stop: CancellationToken) {
        let TlsFiles { certificate, key, look_every } = self.files.clone();
        let take_over = || read(&self.files).map(|config| self.config.store(config));
        fresh::watch(vec![certificate, key], look_every, reread, stop, take_over).await;
    }
}

fn read(files: &TlsFiles) -> Result<Arc<ServerConfig>, ServeError> {
    let error = |path: &Path, why: &dyn std::fmt::Display| ServeError::Tls {
        path: path.display().to_string(),
        why: why.to_string(),
    };
    let chain = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|why| error(&files.certificate, &why))?;
    if chain.is_empty() {
        return Err(error(&files.certificate, &"there is no certificate in it"));
    }
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|why| error(&files.key, &why))?;
    let provider = Arc::new(crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|why| error(&files.certificate, &why))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
