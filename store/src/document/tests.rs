use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn parse(document: &Value, said: &str) -> Result<Document, DocumentError> {
    Document::parse(document.to_string().as_bytes(), said, &Digest::of(b""))
}

fn descriptor(media_type: &str) -> Value {
    json!({ "mediaType": media_type, "digest": Digest::of(b"x"), "size": 1 })
}

fn manifest(layer: &str) -> Value {
    json!({ "schemaVersion": 2, "config": descriptor(OCI_CONFIG), "layers": [descriptor(layer)] })
}

fn refusal(document: &Value) -> String {
    match parse(document, OCI_MANIFEST) {
        Ok(_) => panic!("{document} was accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn every_layer_that_a_guest_unpacks_is_known_and_no_other() {
    for (media_type, compression) in [
        ("application/vnd.oci.image.layer.v1.tar", Compression::None),
        ("application/vnd.oci.image.layer.v1.tar+gzip", Compression::Gzip),
        ("application/vnd.oci.image.layer.v1.tar+zstd", Compression::Zstd),
        ("application/vnd.docker.image.rootfs.diff.tar", Compression::None),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", Compression::Gzip),
    ] {
        let Ok(Document::Manifest(manifest)) = parse(&manifest(media_type), OCI_MANIFEST) else {
            panic!("{media_type} was refused");
        };
        assert_eq!(manifest.layers[0].compression().unwrap(), compression);
    }
    for media_type in ["", "application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "text/plain"] {
        assert!(refusal(&manifest(media_type)).contains(media_type));
    }
    let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    assert!(refusal(&manifest(foreign)).contains("foreign"));
}

#[test]
fn a_document_that_does_not_say_what_it_is_is_known_by_how_it_came_or_by_its_fields() {
    assert!(matches!(parse(&manifest(OCI_LAYER), ""), Ok(Document::Manifest(_))));
    assert!(matches!(parse(&manifest(OCI_LAYER), DOCKER_MANIFEST), Ok(Document::Manifest(_))));
    let index = json!({ "schemaVersion": 2, "manifests": [] });
    assert!(matches!(parse(&index, "application/json"), Ok(Document::Index(_))));
    assert!(parse(&manifest(OCI_LAYER), "text/html").is_err());
    let mut empty = manifest(OCI_LAYER);
    empty["layers"] = Value::Null;
    assert!(parse(&empty, OCI_MANIFEST).is_ok(), "an image without layers, as Go writes it");
    assert!(parse(&json!({ "manifests": null }), OCI_INDEX).is_ok());
    assert!(parse(&json!({ "schemaVersion": 2 }), OCI_INDEX).is_err());
}

#[test]
fn artifacts_schema_1_and_floods_of_layers_are_refused_by_name() {
    let mut artifact = manifest(OCI_LAYER);
    artifact["config"] = descriptor("application/vnd.oci.empty.v1+json");
    assert!(refusal(&artifact).contains("vnd.oci.empty"));
    artifact["artifactType"] = "application/vnd.example.chart".into();
    assert!(refusal(&artifact).contains("vnd.example.chart"));
    assert!(refusal(&json!({ "schemaVersion": 1, "mediaType": DOCKER_SCHEMA_1 })).contains("schema 1"));
    let Err(error) = parse(&json!({ "schemaVersion": 1, "fsLayers": [] }), "") else { panic!("accepted") };
    assert!(error.to_string().contains("schema 1"));
    let mut flood = manifest(OCI_LAYER);
    flood["layers"] = vec![descriptor(OCI_LAYER); MOST_LAYERS + 1].into();
    assert!(refusal(&flood).contains("129 layers"));
    let mut huge = manifest(OCI_LAYER);
    huge["config"]["size"] = (LARGEST_DOCUMENT + 1).into();
    assert!(refusal(&huge).contains("too large"));
    let mut negative = manifest(OCI_LAYER);
    negative["layers"][0]["size"] = (-1).into();
    assert!(refusal(&negative).contains("not what"));
}

#[test]
fn an_index_gives_the_platforms_entry_and_skips_attestations() {
    let entry = |platform: Value| {
        let mut entry = descriptor(OCI_MANIFEST);
        entry["platform"] = platform;
        entry
    };
    let mut provenance = entry(json!({ "os": "unknown", "architecture": "unknown" }));
    provenance["annotations"] = json!({ "vnd.docker.reference.type": "attestation-manifest" });
    let mut mine = entry(json!({ "os": "linux", "architecture": "amd64" }));
    mine["digest"] = Digest::of(b"mine").to_string().into();
    let arm = entry(json!({ "os": "linux", "architecture": "arm64", "variant": "v8", "os.version": "1" }));
    let index = |manifests: Vec<Value>| -> Index {
        serde_json::from_value(json!({ "manifests": manifests })).unwrap()
    };
    let wanted: Platform = "linux/amd64".parse().unwrap();
    let both = index(vec![provenance.clone(), arm.clone(), mine]);
    assert_eq!(both.choose(&wanted).unwrap().digest, Digest::of(b"mine"));
    let found = index(vec![provenance, arm]).choose(&wanted).unwrap_err();
    assert_eq!(list(&found), "linux/arm64/v8");
    assert!(index(vec![]).choose(&wanted).unwrap_err().is_empty());
}

proptest! {
    #[test]
    fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Document::parse(&bytes, OCI_MANIFEST, &Digest::of(b""));
    }

    #[test]
    fn a_manifest_with_any_byte_changed_is_read_or_refused(at in 0_usize..200, byte in any::<u8>()) {
        let mut bytes = manifest(OCI_LAYER).to_string().into_bytes();
        let at = at % bytes.len();
        bytes[at] = byte;
        let _ = Document::parse(&bytes, OCI_MANIFEST, &Digest::of(b""));
    }
}
