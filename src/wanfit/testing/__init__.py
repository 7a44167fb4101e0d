"""What tests of workers and endpoints can use, ours and anybody's: nothing here runs in a server.

`runpod_queue` is RunPod's side of a worker, on the loopback; `fixtures` has it for pytest.
"""
