# Attacks and checks of exported students. Each attack on each block of images is cached, so a killed job continues.


rule autoattack_student:
    input:
        weights=rules.export_student.output.weights,
        student=rows_to_export,
        test=rules.prepare_data.output.test,
    output:
        table="<results>/autoattack_student/{budget}/table.parquet",
    log:
        "<logs>/autoattack_student/{budget}.log",
    benchmark:
        "<benchmarks>/autoattack_student/{budget}.tsv"
    priority: 1  # the long chain of a student first: all else fills the cores beside it
    conda:
        "../../environment.yml"
    threads: parallel_threads(8)
    resources:
        mem_mb=per_attempt(8000),
        runtime=per_attempt(1440),
        gpu=1,
    params:
        settings=settings("autoattack_student"),
        seed=run.seed,
        cache=CACHE,
    shell:
        "python -m proard.stages.autoattack_student --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --weights {input.weights:q} --student {input.student:q}"
        " --test {input.test:q} --budget {wildcards.budget:q} --cache {params.cache:q}"
        " --table {output.table:q} 2>&1 | tee {log:q}"


rule autoattack_students:
    input:
        collect(rules.autoattack_student.output, budget=BUDGETS),


rule check_student:
    input:
        weights=rules.export_student.output.weights,
        onnx=rules.export_student.output.onnx,
        student=rows_to_export,
        autoattack=table_of_autoattack,
        teacher=teacher_to_transfer_from,
        supernet=supernet_to_export,
        train=images_to_transfer_from,
        test=rules.prepare_data.output.test,
    output:
        checks="<results>/check_student/{budget}/checks.parquet",
    log:
        "<logs>/check_student/{budget}.log",
    benchmark:
        "<benchmarks>/check_student/{budget}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=per_attempt(8000),
        runtime=per_attempt(120),
        gpu=1,
    params:
        settings=settings("check_student"),
        seed=run.seed,
        others=lambda wildcards, input: flags_of(input, "autoattack", "teacher", "supernet", "train"),
    shell:
        "python -m proard.stages.check_student --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --weights {input.weights:q} --onnx {input.onnx:q}"
        " --student {input.student:q} {params.others} --test {input.test:q} --budget {wildcards.budget:q}"
        " --checks {output.checks:q} 2>&1 | tee {log:q}"


rule check_students:
    input:
        collect(rules.check_student.output, budget=BUDGETS),


# The card is also copied beside the exported files, so that their folder has the same card.
rule describe_student:
    input:
        weights=rules.export_student.output.weights,
        student=rows_to_export,
        supernet=supernet_to_export,
        trained=weights_to_export,
        manifest=rules.prepare_data.output.manifest,
        autoattack=table_of_autoattack,
        checks=table_of_checks,
        quantised=table_of_int8,
    output:
        card="<results>/describe_student/{budget}/card.md",
    log:
        "<logs>/describe_student/{budget}.log",
    benchmark:
        "<benchmarks>/describe_student/{budget}.tsv"
    conda:
        "../../environment.yml"
    resources:
        mem_mb=per_attempt(2000),
        runtime=30,
    params:
        settings=settings("describe_student"),
        seed=run.seed,
        others=lambda wildcards, input: flags_of(input, "supernet", "trained", "autoattack", "checks", "quantised"),
    shell:
        "python -m proard.stages.describe_student --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device cpu --weights {input.weights:q} --student {input.student:q}"
        " --manifest {input.manifest:q} {params.others} --budget {wildcards.budget:q}"
        " --card {output.card:q} 2>&1 | tee {log:q}"


rule describe_students:
    input:
        collect(rules.describe_student.output, budget=BUDGETS),
