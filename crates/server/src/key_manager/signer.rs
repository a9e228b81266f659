//! What signs with a key, wherever the key is.

use std::time::Duration;

use async_trait::async_trait;
use countersign_identity::{KeyType, PublicSide, SignatureAlgorithm};

/// Longest wait for one signature: agents and workloads wait as long.
pub const SIGN_DEADLINE: Duration = Duration::from_secs(10);

/// Why a key did not sign.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The key does not sign in this way.
    #[error("a key of type {key_type} does not sign with {algorithm}")]
    Algorithm {
        /// Type of the key.
        key_type: KeyType,
        /// The algorithm that was asked for.
        algorithm: SignatureAlgorithm,
    },
    /// Whatever holds the key refuses or has failed. Holds its reason.
    #[error("the key does not sign: {}", countersign_identity::shown::sentence(_0, 512))]
    Failed(String),
    /// It has not signed within this time.
    #[error("the key has not signed for {} seconds; try again", .0.as_secs())]
    Timeout(Duration),
}

/// Signs with one key. The key stays where it is.
#[async_trait]
pub trait Signer: Send + Sync {
    /// The public key as PKIX DER (RFC 5280, 4.1.2.7).
    fn public_key(&self) -> &[u8];
    /// The type of the key, which says what it signs with.
    fn key_type(&self) -> KeyType;
    /// Signs a whole message, which whatever holds the key may hash first. ECDSA signatures are in ASN.1 (RFC 3279, 2.2.3).
    /// Callers use [`sign`], which has the deadline.
    async fn sign(&self, algorithm: SignatureAlgorithm, message: &[u8]) -> Result<Vec<u8>, SignError>;
}

impl dyn Signer + '_ {
    /// The key as certificates and tokens are made for it.
    pub fn public_side(&self) -> PublicSide<'_> {
        PublicSide { key: self.public_key(), algorithm: self.key_type().into() }
    }
}

/// Signs a message as keys of this type do, within [`SIGN_DEADLINE`].
pub async fn sign(signer: &dyn Signer, message: &[u8]) -> Result<Vec<u8>, SignError> {
    let signed = signer.sign(signer.key_type().into(), message);
    tokio::time::timeout(SIGN_DEADLINE, signed).await.unwrap_or(Err(SignError::Timeout(SIGN_DEADLINE)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key_manager::ephemeral;
    use std::sync::Arc;

    /// A key that signs after a while, or not at all.
    struct Slow(Arc<dyn Signer>, Option<Duration>);

    #[async_trait]
    impl Signer for Slow {
        fn public_key(&self) -> &[u8] {
            self.0.public_key()
        }

        fn key_type(&self) -> KeyType {
            self.0.key_type()
        }

        async fn sign(&self, algorithm: SignatureAlgorithm, message: &[u8]) -> Result<Vec<u8>, SignError> {
            match self.1 {
                Some(pause) => tokio::time::sleep(pause).await,
                None => return Err(SignError::Failed("slot 3:\n\u{1b}[31mno token".into())),
            }
            self.0.sign(algorithm, message).await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_signature_is_waited_for_until_the_deadline_and_no_longer() {
        let key = ephemeral(KeyType::EcP256).unwrap();
        let late = Slow(key.clone(), Some(SIGN_DEADLINE.mul_f32(0.99)));
        let signature = sign(&late, b"message").await.unwrap();
        assert!(key.public_side().algorithm.verifies(key.public_key(), b"message", &signature));
        let never = Slow(key, Some(SIGN_DEADLINE.mul_f32(1.01)));
        let why = sign(&never, b"message").await.unwrap_err().to_string();
        assert_eq!(why, "the key has not signed for 10 seconds; try again");
    }

    #[tokio::test]
    async fn a_refusal_is_told_without_what_would_write_to_a_terminal() {
        let why = sign(&Slow(ephemeral(KeyType::EcP256).unwrap(), None), b"message").await.unwrap_err().to_string();
        assert!(why.starts_with("the key does not sign: slot 3:") && why.ends_with("no token"), "{why}");
        assert!(!why.contains(['\u{1b}', '\n']), "{why}");
    }
}
