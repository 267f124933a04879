//! virtio-net (virtio §5.1): its place among the devices. It has no backend yet, so none can be made: the type has no values.

/// No value of this type exists.
#[derive(Debug)]
pub enum Net {}
