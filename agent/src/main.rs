//! The guest's `/init`: see the library.

fn main() {
    carrel_protocol::abort_on_panic();
    carrel_agent::run();
}
