-- Makes blocks that were staged those of a plan, if it is registered. Of one that was collected meanwhile none may come back:
-- they are removed. KEYS: head, plans, then per block: where it is staged, where it belongs. ARGV: uid, plan_id. Repeatable.
-- Returns 1, or 0 if the plan, the experiment or a block is gone.
if redis.call('HGET', KEYS[1], 'uid') ~= ARGV[1] or redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0 then
  redis.call('UNLINK', unpack(KEYS, 3))
  return 0
end
for number = 3, #KEYS, 2 do
  local staged, block = KEYS[number], KEYS[number + 1]
  if redis.call('EXISTS', staged) == 1 then
    redis.call('RENAME', staged, block)
    redis.call('PERSIST', block)
  elseif redis.call('EXISTS', block) == 0 then
    return 0
  end
end
return 1
