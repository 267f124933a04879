//! The reader of a template's record: whatever stands in it, with a checksum that fits, it is a record that says what it says or an error.
#![no_main]

use carrel_store::templates::{Part, TemplateRecord};
use carrel_store::{Digest, TemplateKey};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    let key: TemplateKey = "0123456789abcdef".repeat(4).parse().expect("64 digits are a key");
    let _ = TemplateRecord::parse(text, &key);
    // The checksum is what else would stop nearly all of them.
    let sealed =
        [format!("{{\"checksum\":\"{}\",\"record\":", Digest::of(text)).as_bytes(), text, b"}"].concat();
    if let Ok(record) = TemplateRecord::parse(&sealed, &key) {
        assert_eq!(record.key, key);
        // What whoever lists it asks.
        let _ = (record.created(), record.bytes());
        for part in Part::ALL {
            let _ = record.part(part).digest.to_string();
        }
    }
});
