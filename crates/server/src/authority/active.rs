//! What signs: the active authority of each kind, with its key.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use countersign_identity::profile::IssueError;

use super::{Public, Record};
use crate::key_manager::Signer;
use crate::signing_ca::SigningCa;
use crate::signing_jwt::SigningJwt;

/// The active authorities. Readers never wait.
#[derive(Default)]
pub struct Active {
    /// Signs X509-SVIDs; `None` if none is active.
    pub x509: ArcSwapOption<SigningCa>,
    /// Signs JWT-SVIDs; `None` if none is active.
    pub jwt: ArcSwapOption<SigningJwt>,
}

impl Active {
    /// Lets this one sign.
    pub fn switch(&self, to: Signing) {
        match to {
            Signing::X509(ca) => self.x509.store(Some(ca)),
            Signing::Jwt(key) => self.jwt.store(Some(key)),
        }
    }

    /// Lets these and no other ones sign.
    pub fn replace(&self, all: Vec<Signing>) {
        let next = Self::default();
        all.into_iter().for_each(|one| next.switch(one));
        self.x509.store(next.x509.into_inner());
        self.jwt.store(next.jwt.into_inner());
    }
}

/// An authority with its key.
pub enum Signing {
    /// Signs X509-SVIDs.
    X509(Arc<SigningCa>),
    /// Signs JWT-SVIDs.
    Jwt(Arc<SigningJwt>),
}

impl Signing {
    /// Joins an authority and its key. Errors: [`IssueError::Authority`] if they do not match.
    pub fn new(record: &Record, key: Arc<dyn Signer>) -> Result<Self, IssueError> {
        Ok(match &record.public {
            Public::X509 { certificate, chain } => {
                Self::X509(Arc::new(SigningCa::new(certificate.clone(), chain.clone(), key)?))
            }
            Public::Jwt { key: public, .. } => Self::Jwt(Arc::new(SigningJwt::new(public.clone(), key)?)),
        })
    }
}
