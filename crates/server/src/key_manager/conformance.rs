//! What every key manager does, on each of them.

use std::sync::Arc;

use countersign_identity::KeyType;

use super::{Disk, KeyManager, Memory, SignError, sign};

/// Each key manager that runs without more than this machine. The folder is that of those with files.
fn managers(dir: &tempfile::TempDir) -> Vec<(&'static str, Arc<dyn KeyManager>)> {
    vec![("disk", Arc::new(Disk::new(dir.path().join("keys")).unwrap())), ("memory", Arc::<Memory>::default())]
}

#[tokio::test]
async fn a_key_of_each_type_signs_what_its_public_key_verifies() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, keys) in managers(&dir) {
        for key_type in [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048] {
            let made = keys.generate("a1", key_type).await.unwrap();
            let found = keys.get("a1").await.unwrap().unwrap();
            for key in [&made, &found] {
                assert_eq!((key.key_type(), key.public_key()), (key_type, made.public_key()), "{kind}");
                let (signature, algorithm) = (sign(&**key, b"message").await.unwrap(), key.public_side().algorithm);
                assert!(algorithm.verifies(made.public_key(), b"message", &signature), "{kind} {key_type}");
                assert!(!algorithm.verifies(made.public_key(), b"another", &signature), "{kind} {key_type}");
            }
        }
    }
}

#[tokio::test]
async fn a_key_does_not_sign_as_one_of_another_type() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, keys) in managers(&dir) {
        let key = keys.generate("a1", KeyType::EcP256).await.unwrap();
        for other in [KeyType::EcP384, KeyType::Rsa2048] {
            let refused = key.sign(other.into(), b"message").await;
            assert!(matches!(refused, Err(SignError::Algorithm { key_type: KeyType::EcP256, .. })), "{kind}");
        }
    }
}

#[tokio::test]
async fn a_name_has_one_key_and_a_removed_one_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, keys) in managers(&dir) {
        assert!(keys.get("a1").await.unwrap().is_none(), "{kind}");
        let first = keys.generate("a1", KeyType::EcP256).await.unwrap();
        let second = keys.generate("a1", KeyType::EcP256).await.unwrap();
        assert_ne!(first.public_key(), second.public_key(), "{kind}");
        assert_eq!(keys.get("a1").await.unwrap().unwrap().public_key(), second.public_key(), "{kind}");
        keys.generate("b2", KeyType::EcP256).await.unwrap();
        let mut names = keys.names().await.unwrap();
        names.sort();
        assert_eq!(names, ["a1", "b2"], "{kind}");
        keys.remove("a1").await.unwrap();
        keys.remove("a1").await.unwrap();
        assert!(keys.get("a1").await.unwrap().is_none(), "{kind}");
        assert_eq!(keys.names().await.unwrap(), ["b2"], "{kind}");
        // Whoever has it may end what it began.
        sign(&*second, b"message").await.unwrap();
    }
}
