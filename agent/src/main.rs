//! The guest's `/init`: see the library.

fn main() {
    carrel_agent::run();
}
