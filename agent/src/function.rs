//! The Lambda Runtime API of a function's container, and its invocations.

use std::io;
use std::rc::Rc;

use carrel_protocol::agent::{self, ExitStatus, Failure, Invoke, Invoked};

use crate::container::cgroup::Cgroup;
use crate::container::launch::Refusal;
use crate::socket::Dialler;

#[derive(Debug)]
pub(crate) struct Function;

impl Function {
    pub(crate) async fn serve(_: agent::Function, _: Cgroup) -> io::Result<Rc<Self>> {
        Err(io::ErrorKind::Unsupported.into())
    }
    pub(crate) fn environment(&self) -> Vec<(String, String)> {
        Vec::new()
    }
    pub(crate) fn begin(&self) {}
    pub(crate) async fn exited(&self, _: ExitStatus, _: bool) {}
    pub(crate) async fn invoke(&self, _: &Dialler, _: Invoke) -> Result<Invoked, Refusal> {
        Err(Refusal::new(Failure::BadRequest, "no functions"))
    }
}
