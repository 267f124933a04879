//! What unpacking does to a real file system. These tests make devices and owners: they need root.

mod arbitrary;
mod bed;
mod hostile;
mod layers;
mod model;
mod packed;
mod real_tools;
mod sparse;
mod tarball;
mod whole;
mod zips;
