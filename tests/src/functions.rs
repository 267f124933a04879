//! Functions as zips.

use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// A zip made entry by entry, hostile ones included.
pub struct FunctionZip(ZipWriter<Cursor<Vec<u8>>>);

impl Default for FunctionZip {
    fn default() -> Self {
        Self::new()
    }
}

impl FunctionZip {
    /// An empty one.
    pub fn new() -> Self {
        Self(ZipWriter::new(Cursor::new(Vec::new())))
    }

    /// Adds a file that everybody can read.
    #[must_use]
    pub fn file(self, name: &str, content: impl AsRef<[u8]>) -> Self {
        self.file_with_mode(name, content, 0o644)
    }

    /// Adds a file with this mode.
    #[must_use]
    pub fn file_with_mode(mut self, name: &str, content: impl AsRef<[u8]>, mode: u32) -> Self {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Deflated)
            .unix_permissions(mode);
        self.0.start_file(name, options).unwrap();
        self.0.write_all(content.as_ref()).unwrap();
        self
    }

    /// Adds a symbolic link.
    #[must_use]
    pub fn link(mut self, name: &str, target: &str) -> Self {
        self.0.add_symlink(name, target, SimpleFileOptions::default()).unwrap();
        self
    }

    /// Its bytes.
    pub fn bytes(self) -> Vec<u8> {
        self.0.finish().unwrap().into_inner()
    }

    /// Writes it into a folder and returns its path.
    pub fn write(self, folder: &Path) -> PathBuf {
        let path = folder.join("function.zip");
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }
}

/// A Python function, module `app`.
pub fn python(folder: &Path, source: &str) -> String {
    FunctionZip::new().file("app.py", source).write(folder).to_str().unwrap().to_owned()
}

/// Handlers of tests, in one module: so that their functions are one zip, and rooms of one machine begin from one template.
const HANDLERS: &str = r#"
import http.client, os, sys, time

def answers(event, context):
    print('to the log')
    print('to stderr', file=sys.stderr)
    return {'event': event, 'name': context.function_name, 'memory': context.memory_limit_in_mb,
            'left': context.get_remaining_time_in_millis(), 'id': context.aws_request_id,
            'handler': os.environ['_HANDLER'], 'a': os.environ['A'], 'uid': os.getuid(),
            'engine': os.environ['AWS_EXECUTION_ENV'], 'task': os.environ['LAMBDA_TASK_ROOT'],
            'trace': os.environ['_X_AMZN_TRACE_ID']}

def adds(event, context):
    return event['n'] + 1

def raises(event, context):
    raise ValueError('not today')

# The published client doesn't stream, so the function itself does.
def streams(event, context):
    client = http.client.HTTPConnection(os.environ['AWS_LAMBDA_RUNTIME_API'])
    def body():
        for n in range(event['pieces']):
            yield b'x' * (1 << 20)
    path = '/2018-06-01/runtime/invocation/' + context.aws_request_id + '/response'
    headers = {'Lambda-Runtime-Function-Response-Mode': 'streaming', 'Transfer-Encoding': 'chunked'}
    client.request('POST', path, body(), headers, encode_chunked=True)
    print('status', client.getresponse().status)
    time.sleep(600)

def too_large(event, context):
    return 'x' * (7 << 20)

def writes(event, context):
    open('/tmp/ok', 'w').write('1')
    try:
        open('/var/task/no', 'w')
    except OSError as error:
        return [error.errno, os.path.islink('/var/task/link'), os.readlink('/var/task/link')]
"#;

/// What the functions of [`handlers`] are run with.
pub const MEMORY: &str = "512m";

/// A Python function with handlers `app.answers`, `adds`, `raises`, `streams`, `too_large` and `writes`, and a link to its module.
pub fn handlers(folder: &Path) -> String {
    let zip = FunctionZip::new().file("app.py", HANDLERS).link("link", "app.py").write(folder);
    zip.to_str().unwrap().to_owned()
}
