"""The attacks of `test_escape.py`, as programs. Each prints LEAK or WROTE when it got what it wanted.

Placeholders: `@CANARY@` a file outside the sandbox, `@OUTSIDE@` its folder, `@NONCE@` a name used nowhere else, `@PORT@`
a listener on 127.0.0.1, `@PARENT@` the trainer's process.
"""

TRY = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(what, word="LEAK"):
    try:
        result = what()
    except (OSError, RuntimeError, ImportError, ValueError, MemoryError) as error:
        print("refused", type(error).__name__)
        return None
    print(word, repr(result)[:100])
    return result
def syscall(number, *args):
    result = libc.syscall(ctypes.c_long(number), *args)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""

PROCESSES = {
    "fork_bomb": "for _ in range(10 ** 5): attempt(os.fork)",
    "fork_once": "attempt(os.fork)",
    "double_fork_daemon": """
def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            import time; time.sleep(60)
        os._exit(0)
attempt(daemon)
""",
    "zombie_children": "for _ in range(50): attempt(lambda: os.fork() or os._exit(0))",
    "vfork_by_ctypes": "attempt(lambda: syscall(58) if os.uname().machine == 'x86_64' else syscall(220, 17))",
    "shell": "import subprocess; attempt(lambda: subprocess.check_output('echo @NONCE@; sleep 60', shell=True))",
    "posix_spawn": "attempt(lambda: os.posix_spawn('/bin/sh', ['sh', '-c', 'touch @OUTSIDE@/@NONCE@'], {}))",
    "exec": "attempt(lambda: os.execv('/bin/sh', ['sh', '-c', 'sleep 60 #@NONCE@']))",
    "multiprocessing": """
import multiprocessing
def run():
    p = multiprocessing.get_context('fork').Process(target=print); p.start(); return p.pid
attempt(run)
""",
    "kill_parent": "import signal; attempt(lambda: os.kill(@PARENT@, signal.SIGKILL))",
    "kill_fork_server": "import signal; attempt(lambda: os.kill(os.getppid(), signal.SIGKILL))",
    "kill_everyone": "import signal; attempt(lambda: os.kill(-1, signal.SIGKILL))",
    "kill_group": "import signal; attempt(lambda: os.killpg(@PARENT@, signal.SIGKILL))",
    "queue_signal": "attempt(lambda: syscall(129, @PARENT@, 9, bytes(128)))",
    "pidfd": "attempt(lambda: syscall(434, @PARENT@, 0))",
    "ptrace": "attempt(lambda: syscall(101 if os.uname().machine == 'x86_64' else 117, 16, @PARENT@, 0, 0))",
    "process_vm_readv": "attempt(lambda: syscall(310 if os.uname().machine == 'x86_64' else 270, @PARENT@, bytes(16), 1, bytes(16), 1, 0))",
    "raise_own_limits": "import resource; attempt(lambda: resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6)))",
    "scheduler": "attempt(lambda: os.setpriority(os.PRIO_PROCESS, 0, -20))",
    "namespaces": "attempt(lambda: syscall(272 if os.uname().machine == 'x86_64' else 97, 0x10000000 | 0x20000))",
    "mount": "attempt(lambda: syscall(165 if os.uname().machine == 'x86_64' else 40, b'none', b'/tmp', b'tmpfs', 0, None))",
    "chroot": "attempt(lambda: os.chroot('/tmp'))",
    "io_uring": "attempt(lambda: syscall(425, 8, bytes(256)))",
    "bpf": "attempt(lambda: syscall(321 if os.uname().machine == 'x86_64' else 280, 0, bytes(128), 128))",
    "userfaultfd": "attempt(lambda: syscall(323 if os.uname().machine == 'x86_64' else 282, 0))",
    "keyring": "attempt(lambda: syscall(250 if os.uname().machine == 'x86_64' else 219, 0, -3, 1))",
    "become_root": "attempt(lambda: os.setuid(0) or os.setgroups([0]) or syscall(126, bytes(8), bytes(24)))",
}  # fmt: skip

FILES = {
    "write_outside": "attempt(lambda: open('@OUTSIDE@/@NONCE@', 'w'), 'WROTE')",
    "overwrite": "attempt(lambda: open('@CANARY@', 'w'), 'WROTE')",
    "append": "attempt(lambda: open('@CANARY@', 'a').write('x'), 'WROTE')",
    "truncate": "attempt(lambda: os.truncate('@CANARY@', 0), 'WROTE')",
    "unlink": "attempt(lambda: os.unlink('@CANARY@'), 'WROTE')",
    "rename": "attempt(lambda: os.rename('@CANARY@', '@CANARY@.@NONCE@'), 'WROTE')",
    "symlink_through": """
attempt(lambda: (os.symlink('@CANARY@', 'link'), open('link', 'w').write('x')), 'WROTE')
attempt(lambda: (os.symlink('@OUTSIDE@', 'folder'), open('folder/@NONCE@', 'w').write('x')), 'WROTE')
""",
    "hard_link": "attempt(lambda: (os.link('@CANARY@', 'hard'), open('hard', 'w').write('x')), 'WROTE')",
    "chmod": "attempt(lambda: os.chmod('@CANARY@', 0o777), 'did nothing or')",
    "chown": "attempt(lambda: os.chown('@CANARY@', 1, 1), 'WROTE')",
    "make_folders": "attempt(lambda: os.mkdir('@OUTSIDE@/@NONCE@'), 'WROTE')",
    "tmp_and_home": """
for place in ('/tmp', '/var/tmp', '/dev/shm', os.path.expanduser('~root'), '/', '/usr/lib', sys.prefix):
    attempt(lambda: open(place + '/@NONCE@', 'w'), 'WROTE')
""",
    "poison_packages": """
import site
for place in [*site.getsitepackages(), os.path.dirname(os.__file__)]:
    attempt(lambda: open(place + '/@NONCE@.pth', 'w'), 'WROTE')
""",
    "parent_of_scratch": "attempt(lambda: open('../@NONCE@', 'w'), 'WROTE')",
    "device_nodes": "attempt(lambda: os.mknod('disk', 0o60666, os.makedev(8, 0)), 'WROTE')",
    "memfd": "attempt(lambda: os.memfd_create('x'))",
    "shared_memory": "from multiprocessing import shared_memory; attempt(lambda: shared_memory.SharedMemory('@NONCE@', True, 4096))",
    "core_dump": "os.abort()",
    "descriptors": """
for number in range(3, 300):
    try: os.write(number, b'@NONCE@')
    except OSError: continue
    print('written', number)
""",
}  # fmt: skip

READS = {
    "read_file": "attempt(lambda: open('@CANARY@').read())",
    "list_folder": "attempt(lambda: os.listdir('@OUTSIDE@'))",
    "passwords": "attempt(lambda: open('/etc/passwd').read())",
    "environment_of_parent": "attempt(lambda: open('/proc/@PARENT@/environ').read())",
    "memory_of_parent": "attempt(lambda: open('/proc/@PARENT@/mem', 'rb').seek(0))",
    "memory_of_fork_server": "attempt(lambda: open(f'/proc/{os.getppid()}/maps').read())",
    "descriptors_of_parent": "attempt(lambda: os.listdir('/proc/@PARENT@/fd'))",
    "own_environment": "print('LEAK' if '@SECRET@' in repr(dict(os.environ)) else 'clean')",
}

NETWORK = {
    "tcp": "import socket; attempt(lambda: socket.create_connection(('127.0.0.1', @PORT@)))",
    "udp": "import socket; attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @PORT@)))",
    "dns": "import socket; attempt(lambda: socket.getaddrinfo('example.com', 80))",
    "listen": "import socket; attempt(lambda: socket.create_server(('127.0.0.1', 0)))",
    "unix": "import socket; attempt(lambda: socket.socket(socket.AF_UNIX).bind('\\\\0@NONCE@'))",
    "netlink": "import socket; attempt(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))",
    "vsock": "import socket; attempt(lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))",
    "raw": "import socket; attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))",
    "http": "import urllib.request; attempt(lambda: urllib.request.urlopen('http://127.0.0.1:@PORT@'))",
}  # fmt: skip

# Programs that use up something; all must end by the limits below, and none may print DONE.
EXHAUSTION = {
    "memory_bytes": "x = bytearray(4 << 30); print('DONE')",
    "memory_lists": "x = []\nwhile True: x.append([0] * 1000000)",
    "memory_integer": "x = 1 << (8 << 33); print('DONE')",
    "busy_loop": "while True: pass",
    "c_loop": "x = 3 ** (10 ** 9); print('DONE')",
    "regex": "import re; re.match('(a+)+$', 'a' * 60 + 'b'); print('DONE')",
    "sleep": "import time; time.sleep(60); print('DONE')",
    "ignores_signals": """
import signal
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
    "stops_itself": "import signal; os.kill(os.getpid(), signal.SIGSTOP); print('DONE')",
    "deep_recursion": "sys.setrecursionlimit(10 ** 9)\ndef f(): return f()\nf(); print('DONE')",
    "nested_recursion": "x = []\nfor _ in range(10 ** 6): x = [x]\nrepr(x); print('DONE')",
    "threads_that_never_end": "import threading\nfor _ in range(8): threading.Thread(target=threading.Event().wait).start()",
    "thread_bomb": """
import threading
threading.stack_size(32768)
while True:
    try: threading.Thread(target=threading.Event().wait).start()
    except (RuntimeError, MemoryError): pass
""",
    "atexit_loop": "import atexit\natexit.register(lambda: exec('while True: pass'))",
    "stdout_flood": "while True: print('A' * 65536)",
    "stderr_flood": "while True: print('A' * 65536, file=sys.stderr)",
    "one_huge_file": "f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "many_files": "n = 0\nwhile True: n += 1; open(f'f{n}', 'w').write('x')",
    "many_big_files": "n = 0\nwhile True: n += 1; open(f'f{n}', 'wb').write(bytes(1 << 20))",
    "deep_folders": "while True: os.mkdir('d'); os.chdir('d')",
    "locked_folders": "os.umask(0o777); os.mkdir('a'); os.mkdir('b', 0); print('ended')",
    "descriptor_leak": "x = []\nwhile True: x.append(os.open('/dev/null', 0))",
    "pipe_full": "r, w = os.pipe()\nwhile True: os.write(w, bytes(65536))",
    "segfault": "import ctypes; ctypes.string_at(8); print('DONE')",
    "null_bytes_and_surrogates": "sys.stdout.buffer.write(bytes(range(256)) * 10); print('\\ud800\\x00\\u202e')",
}  # fmt: skip

# The old 32-bit gate enters the kernel under other call numbers: 20 is getpid there, writev here.
INT_80 = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))
call = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
print('LEAK', call())
"""
