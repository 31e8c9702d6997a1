"""The plumbing of an experiment, a room per job. Imports go down alone; this page imports nothing.

    startup          from settings to a Run that can be run: pre-flight, models, texts, rehearsal
    preflight        what a run needs: access, data sets, disk and memory
    steps            the steps of several trainers: side by side on a CPU, one graph on a GPU
    training         a training's log and budget; activations that are kept for the next one
    tracking         training watched while it goes on, in W&B or TensorBoard
    peers            SAELens' trainers on the same batches, and their SAEs in raw units
    gpu              losses that are compiled, and steps that are captured as one graph
    provenance       what ran and where: config.json
    records          what a run writes, and the checks that it can be right
    report           a profile's runs, figures and features on one page: plot.py's index.html
    publish          a run as a folder for the Hugging Face hub: a program of its own
    model_card       its README.md there
    privacy          what of a run's records all may read
    sparsify_form    its SAEs in sparsify's form
    evaluation/      core, probing: SAE-Bench's figures, each pass of the language model made once;
                     extra, stock: SAE-Bench's others, where they are asked for;
                     shared_forward, probe_texts, probe_features, estimate: their parts;
                     export: an SAE as SAELens stores it;
                     features, logit_lens: what can be looked at of each feature
    fingerprint      all that a result depends on
    observation      what a run's own code does, seen while it does it
    reads            what tells it of files, folders, variables and modules that code reads
    identity         what objects are
    isolation        a rehearsal leaves no trace
    call_graph       the code that it depends on, from the objects at hand
    syntax           the statements of a Python file
    language_model   any causal language model: itself, and TransformerLens' bridge to it
    model_checks     whether a model is what it has to be
    packaged_model   smollm2's weights, converted once
    compiled_model   a language model's passes on a GPU, compiled
    fused_model      a language model's passes on a CPU, faster
    steering         what a forward pass does at a model's blocks
    tokenizer        how a text becomes token ids: one rule for training, core and probing
    text             from a data set to packed contexts
    text_checks      local texts looked at before anything is paid for
    text_files       local files of texts
    probe_sets       what probing sets are: SAE-Bench's, tasks that ship here, files with labels
    command          one attempt: folder, lock, heartbeat, last words; knows nothing of SAEs
    checkpoints      a training as far as it has come: what is saved, and how it goes on
    rehearsal        whether a training can go on from what it saves: tried in miniature
    store            what outlives a run: one shelf, its codecs
    ledger           what was reused and kept in this attempt, and what is odd
    object_state     what objects hold, found by walking: as plain data, and back
    object_parts     what one object is made of
    console          what a user reads; what stage the command is at
    machine          processor and memory
    reference        the run that another is compared to, or takes constants from
    plans            the runs of a plan: which come first, how they stand (plan.py)
    template         a run as a folder that AI-Scientist starts from: a program of its own
    curves           runs of one method at several L0: which are on one curve
    run_records      what plot.py reads: the records of runs, as frames
    tables           every run beside the reference, as rows and as Markdown
    figures          what came out, a function per figure
    training_figures the same of training
    drawing          their parts: style, axes, lines that are labelled where they end
    generators       the random generators that code draws from unless it is given one
    verdict          better or worse, and what can be compared
    errors           failures whose message is the whole story
    ranks            one run as several processes: who this one is, what they exchange
    signals          what asks the process to end, and ends that nothing holds up
    witness          last words of a process that crashed in C code, or was killed
    partials         what is half-written, and left where a process was killed
    settings         what a setting can be, and the sentence where it isn't
    interfaces       what the harness asks of settings, SAE and trainer
    start            what has to be read before anything else is imported; it speaks until then

`PUBLIC` is the harness's face: the names that experiment.py uses, by room.
"""

PUBLIC = {
    "evaluation.core": ("core_evaluation", "mean_l0"),
    "evaluation.export": ("export_saes",),
    "evaluation.extra": ("extra_evaluations",),
    "evaluation.probing": ("sparse_probing",),
    "generators": ("seed_generators",),
    "gpu": ("compiled",),
    "language_model": ("hook_name",),
    "machine": ("in_order", "trim_memory"),
    "peers": ("TUNED", "peer_trainers"),
    "records": ("check_results", "write_records"),
    "settings": ("checked", "must_hold", "sweep"),
    "startup": ("Run", "launch"),
    "steps": ("replace_entries", "take_steps"),
    "text": ("TokenStream", "documents"),
    "tokenizer": ("counted",),
    "training": ("ActivationCache", "ActivationStats", "TrainingLog"),
}
