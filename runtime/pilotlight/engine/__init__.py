"""Token ids in, token ids out: slots, scheduler, sampler, session and the thread that drives them."""
